from __future__ import annotations

import copy
import re
from collections import OrderedDict
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from ptq_networks import CHANNELS, Decoder, DecoderLayer, Helper, Mlp, batches, parameter_values, strategies

from gs_dist.ptq import (
    PTQ,
    AWQConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
)

W8A8 = {"act_quant_dtype": ms.int8}


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


# Construction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [1, "w8", [PTQConfig()], AWQConfig()])
def test_config_of_another_type_is_a_type_error(config: Any):
    """PTQ takes a PTQConfig, a dict of its fields, or None."""
    with pytest.raises(TypeError, match="PTQConfig"):
        PTQ(config)


def test_dict_of_fields_is_a_config():
    """A dict of PTQConfig's fields does what the config would do."""
    by_dict = PTQ({"act_quant_dtype": ms.int8}).apply(Mlp(), datasets=batches(2))
    by_config = PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(Mlp(), datasets=batches(2))
    x = ms.Tensor(batches()[0])
    np.testing.assert_array_equal(by_dict(x).asnumpy(), by_config(x).asnumpy())


def test_unknown_field_names_the_nearest():
    """A misspelt key of a config given as a dict is refused with the field that was meant."""
    with pytest.raises(TypeError, match="'act_quant_dtype'"):
        PTQ({"act_quant_type": ms.int8})


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param({".*": PTQConfig()}, id="plain dict"),
        pytest.param([(".*", PTQConfig())], id="list"),
        pytest.param(OrderedDict({1: PTQConfig()}), id="key"),
        pytest.param(OrderedDict({"(": PTQConfig()}), id="regular expression"),
        pytest.param(OrderedDict({"(": None}), id="regular expression of None"),
        pytest.param(OrderedDict({".*": {"act_quant_dtype": None}}), id="value"),
        pytest.param(OrderedDict({".*": 0}), id="falsy value"),
    ],
)
def test_layer_policies_of_another_type_are_a_type_error(policies: Any):
    """layer_policies is an OrderedDict of regular expressions to PTQConfig or None."""
    with pytest.raises(TypeError, match="layer_policies"):
        PTQ(PTQConfig(), policies)


BAD_SCHEMES = [
    pytest.param({"weight_quant_dtype": None, "act_quant_dtype": ms.int8}, "weight_quant_dtype", id="P1"),
    pytest.param({**W8A8, "outliers_suppression": OutliersSuppressionType.AWQ}, "AWQ", id="P2 AWQ"),
    pytest.param({**W8A8, "precision_recovery": PrecisionRecovery.GPTQ}, "GPTQ", id="P2 GPTQ"),
    pytest.param(
        {"outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE},
        "outlier-suppression-lite",
        id="P3 W8A16",
    ),
    pytest.param(
        {
            **W8A8,
            "kvcache_quant_dtype": ms.int8,
            "outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        },
        "outlier-suppression-lite",
        id="P3 with KV cache",
    ),
    pytest.param({"weight_quant_dtype": ms.qint4x2, "kvcache_quant_dtype": ms.int8}, "qint4x2", id="P4"),
    pytest.param(
        {"weight_quant_dtype": None, "outliers_suppression": OutliersSuppressionType.SMOOTH},
        "weight_quant_dtype",
        id="suppression without weights",
    ),
]


@pytest.mark.parametrize(("fields", "says"), BAD_SCHEMES)
def test_scheme_that_no_algorithm_serves_is_a_value_error(fields: dict[str, Any], says: str):
    """Combinations of settings that contradict each other are refused when PTQ is made."""
    with pytest.raises(ValueError, match=says):
        PTQ(PTQConfig(**fields))


@pytest.mark.parametrize(("fields", "says"), BAD_SCHEMES)
def test_scheme_of_a_layer_policy_is_checked_too(fields: dict[str, Any], says: str):
    """A layer policy is held to the same rules as the network's config."""
    with pytest.raises(ValueError, match=says):
        PTQ(PTQConfig(), OrderedDict({".*": PTQConfig(**fields)}))


def test_quantize_needs_pynative_mode(graph_mode: None):
    """QUANTIZE in graph mode is refused at once; DEPLOY is not."""
    with pytest.raises(ValueError, match="PYNATIVE_MODE"):
        PTQ(PTQConfig())
    PTQ(PTQConfig(mode=PTQMode.DEPLOY))


def test_mode_of_a_layer_policy_gives_way_with_a_warning(caplog: pytest.LogCaptureFixture):
    """A layer policy's own mode does not count, and the caller's object keeps it."""
    policy = PTQConfig(mode=PTQMode.DEPLOY)
    PTQ(PTQConfig(), OrderedDict({".*": policy}))
    assert "mode" in caplog.text
    assert policy.mode is PTQMode.DEPLOY


# apply ----------------------------------------------------------------------------------------------------


def test_apply_refuses_what_is_no_cell():
    """Only a Cell can be quantised."""
    with pytest.raises(TypeError, match="Cell"):
        PTQ().apply(lambda x: x, datasets=batches(2))


@pytest.mark.parametrize("datasets", [None, [], iter(())])
def test_apply_needs_data(datasets: Any):
    """No calibration data, or data without a row, is a ValueError."""
    with pytest.raises(ValueError, match="datasets"):
        PTQ().apply(Mlp(), datasets=datasets)


@pytest.mark.parametrize("datasets", [1, "rows.parquet", np.zeros((2, CHANNELS)), [[1.0]], [{"x": 1}]])
def test_apply_refuses_data_of_another_kind(datasets: Any):
    """Data that is no dataset and no iterable of arrays is a TypeError."""
    with pytest.raises(TypeError, match="datasets"):
        PTQ().apply(Mlp(), datasets=datasets)


def test_deploy_needs_a_helper():
    """DEPLOY without network_helper is a ValueError."""
    with pytest.raises(ValueError, match="network_helper"):
        PTQ(PTQConfig(mode=PTQMode.DEPLOY)).apply(Mlp(), datasets=batches(2))


def test_helper_of_another_type_is_a_type_error():
    """network_helper is a NetworkHelper."""
    with pytest.raises(TypeError, match="network_helper"):
        PTQ().apply(Mlp(), network_helper=object(), datasets=batches(2))


def test_uninitialized_algorithm_is_a_runtime_error():
    """A subclass that forgot PTQ.__init__ is told so by apply."""

    class Mine(PTQ):
        def __init__(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="not initialised"):
        Mine().apply(Mlp(), datasets=batches(2))


def test_apply_in_graph_mode_is_a_value_error():
    """A PTQ made in PyNative mode does not run in graph mode."""
    ptq = PTQ()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with pytest.raises(ValueError, match="PYNATIVE_MODE"):
            ptq.apply(Mlp(), datasets=batches(2))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_unknown_keyword_of_apply_is_a_type_error():
    """A keyword that would have no effect is refused."""
    with pytest.raises(TypeError, match="framework"):
        PTQ().apply(Mlp(), datasets=batches(), framework="mindone")
    with pytest.raises(ValueError, match="'original' or 'quantized', but got 'float'"):
        PTQ().apply(Mlp(), datasets=batches(), propagation="float")


# Which layers ---------------------------------------------------------------------------------------------


def applied_strategies(
    capsys: pytest.CaptureFixture[str], config: PTQConfig, policies: OrderedDict[str, Any] | None = None, **kwargs: Any
) -> dict[str, str]:
    ptq = PTQ(config, policies)
    ptq.summary(ptq.apply(Decoder(), datasets=batches(2), **kwargs))
    return strategies(capsys.readouterr().out)


def test_policy_replaces_the_config_of_layers_it_matches(capsys: pytest.CaptureFixture[str]):
    """A pattern is matched from the start of the full name, and its config counts alone, blacklist included."""
    policies = OrderedDict(
        {
            r".*\.up_proj": PTQConfig(act_quant_dtype=ms.int8),
            r"layers\.0\.q_proj": None,
        }
    )
    rows = applied_strategies(capsys, PTQConfig(opname_blacklist=["_proj", "head"]), policies)
    assert rows == {
        "layers.0.q_proj": "NA",
        "layers.0.up_proj": "W8-perchannel-A8-pertensor",
        "layers.0.down_proj": "NA",
        "layers.0.cache": "NA",
        "layers.1.q_proj": "NA",
        "layers.1.up_proj": "W8-perchannel-A8-pertensor",
        "layers.1.down_proj": "NA",
        "layers.1.cache": "NA",
        "head": "NA",
    }


def test_blacklist_of_a_policy_holds_for_its_layers(capsys: pytest.CaptureFixture[str]):
    """A layer policy's own blacklist leaves some of its layers alone."""
    policies = OrderedDict({r".*_proj": PTQConfig(act_quant_dtype=ms.int8, opname_blacklist=["layers.0"])})
    rows = applied_strategies(capsys, PTQConfig(), policies)
    assert (rows["layers.0.up_proj"], rows["layers.1.up_proj"]) == ("NA", "W8-perchannel-A8-pertensor")


def test_two_patterns_on_one_layer_conflict():
    """Two matching patterns are a RuntimeError that names both and the layer, whatever their order."""
    policies = OrderedDict({r".*q_proj": PTQConfig(), r"layers\.0\..*": PTQConfig()})
    with pytest.raises(RuntimeError, match=r"q_proj.*layers.*layers\.0\.q_proj") as caught:
        PTQ(PTQConfig(), policies).apply(Decoder(), datasets=batches(1))
    assert r"layers\.0\..*" in str(caught.value).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("config", "policies", "says"),
    [
        pytest.param({}, {r"q_proj": PTQConfig()}, "q_proj", id="pattern without .*"),
        pytest.param({}, {r"network\.layers.*": PTQConfig()}, "network", id="upstream's prefix"),
        pytest.param({"opname_blacklist": ["lm_head"]}, {}, "lm_head", id="blacklist"),
        pytest.param(
            {"opname_blacklist": ["q_proj"]}, {r".*q_proj": PTQConfig()}, "layer_policies", id="overruled blacklist"
        ),
        pytest.param({"opname_blacklist": ["proj", "head"]}, {}, "unquantised", id="everything blacklisted"),
        pytest.param({"weight_quant_dtype": None}, {}, "unquantised", id="nothing asked"),
        pytest.param({}, {r".*": None}, "unquantised", id="everything left alone"),
        pytest.param({}, {r".*_proj": PTQConfig(weight_quant_dtype=None)}, "quantises nothing", id="empty policy"),
        pytest.param(
            {}, {r".*q_proj": PTQConfig(kvcache_quant_dtype=ms.int8)}, "KVCache", id="KV setting on linears alone"
        ),
        pytest.param(
            {}, {r".*q_proj": PTQConfig(opname_blacklist=["layers"])}, "blacklist", id="policy that blocks itself"
        ),
    ],
)
def test_setting_that_affects_no_layer_is_an_error(config: dict[str, Any], policies: dict[str, Any], says: str):
    """Patterns, blacklist entries and settings without effect are refused, never a silent float network."""
    ptq = PTQ(PTQConfig(**config), OrderedDict(policies))
    with pytest.raises(ValueError, match=says):
        ptq.apply(Decoder(), datasets=batches(1))


def test_kv_cache_setting_needs_a_kv_cache():
    """kvcache_quant_dtype on a network without a KVCache cell is refused."""
    with pytest.raises(ValueError, match="KVCache"):
        PTQ(PTQConfig(kvcache_quant_dtype=ms.int8)).apply(Mlp(), datasets=batches(1))


def test_network_without_linears_is_refused():
    """A network in which nothing can be quantised is an error."""
    with pytest.raises(ValueError, match="no linear"):
        PTQ().apply(nn.ReLU(), datasets=batches(1))


def test_linears_outside_decoder_layers_stay(capsys: pytest.CaptureFixture[str]):
    """With decoder layers known, other linears stay as they are unless a pattern matches them."""
    known = {"decoder_layer_types": [DecoderLayer]}
    assert applied_strategies(capsys, PTQConfig(), **known)["head"] == "NA"
    policies = OrderedDict({"head": PTQConfig(act_quant_dtype=ms.int8)})
    assert applied_strategies(capsys, PTQConfig(), policies, **known)["head"] == "W8-perchannel-A8-pertensor"
    assert applied_strategies(capsys, PTQConfig(opname_blacklist=["head"]), **known)["head"] == "NA"


def test_unknown_decoder_layers_make_one_layer_with_a_warning(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """Without known decoder layer types the whole network is one layer, and a warning says so."""
    rows = applied_strategies(capsys, PTQConfig())
    assert rows["head"] == "W8-perchannel"
    assert "decoder_layer_types" in caplog.text


def test_linear_that_no_data_reaches_is_named():
    """A linear to be quantised that the data never reached is an error naming it."""

    class Branch(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Dense(CHANNELS, 4)

    with pytest.raises(ValueError, match="unused"):
        PTQ().apply(Branch(), datasets=batches(1))
    PTQ(PTQConfig(opname_blacklist=["unused"])).apply(Branch(), datasets=batches(1))


def test_activation_that_is_not_finite_is_named():
    """Data that make an activation infinite fail instead of giving scales."""
    data = batches(2)
    data[1][0, 0, 0] = np.inf
    with pytest.raises(RuntimeError, match=r"body\.0"):
        PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(Mlp(), datasets=data)


# The caller's objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param({**W8A8, "act_range": "minmax"}, "of the median token's output is lost", id="a massive token"),
        pytest.param({"weight_quant_dtype": ms.qint4x2}, "of the output's energy is lost", id="a loud column"),
    ],
)
def test_linear_that_rounding_destroys_is_warned_of(
    fields: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
):
    """What a job would refuse by default is named with what is lost; ordinary data bring no warning."""
    network, rows = Mlp(has_bias=False), batches(outlier=1.0)
    PTQ(PTQConfig(**fields)).apply(network, datasets=rows)
    assert "destroyed" not in caplog.text
    if "act_range" in fields:
        rows[0][0, 0, 5] = 1e4
    else:
        first = network.body[0].weight
        values = first.asnumpy().copy()
        values[:, 7] *= 1e3
        first.set_data(ms.Tensor(values))
        for row in rows:
            row[..., 7] = 0.0
    PTQ(PTQConfig(**fields)).apply(network, datasets=rows)
    assert "body.0 is destroyed by rounding" in caplog.text
    assert says in caplog.text
    assert "layer_policies" in caplog.text


def test_callers_objects_stay_as_they_were():
    """Neither network, config, policies nor data change, and the network still gives the same output."""
    network = Decoder()
    config = PTQConfig(act_quant_dtype=ms.int8, outliers_suppression=OutliersSuppressionType.SMOOTH)
    policies = OrderedDict({r".*down_proj": PTQConfig(mode=PTQMode.DEPLOY), "head": None})
    data = batches(3)
    x = ms.Tensor(data[0])
    before = (copy.deepcopy(config), copy.deepcopy(policies), [row.copy() for row in data])
    cells = [(name, type(cell)) for name, cell in network.cells_and_names()]
    values, output = parameter_values(network), network(x).asnumpy()
    ptq = PTQ(config, policies)
    ptq.convert(ptq.apply(network, datasets=data))
    assert (config, policies) == before[:2]
    assert all(np.array_equal(a, b) for a, b in zip(data, before[2], strict=True))
    assert [(name, type(cell)) for name, cell in network.cells_and_names()] == cells
    after = parameter_values(network)
    assert list(after) == list(values)
    assert all(np.array_equal(after[name], values[name]) for name in values)
    np.testing.assert_array_equal(network(x).asnumpy(), output)


def test_network_survives_data_that_fail():
    """A row that breaks the forward pass leaves the caller's network without hooks or exchanged cells."""
    network = Mlp()
    x = ms.Tensor(batches(1)[0])
    output = network(x).asnumpy()
    with pytest.raises((ValueError, RuntimeError)):
        PTQ().apply(network, datasets=[batches(1)[0], np.zeros((2, 3), np.float32)])
    assert all(type(cell) is not PTQ for cell in network.cells())
    np.testing.assert_array_equal(network(x).asnumpy(), output)


def test_convert_leaves_the_fake_quantized_network():
    """What convert returns is another network; the fake-quantised one goes on working."""
    ptq = PTQ()
    fake = ptq.apply(Mlp(), datasets=batches(1))
    x = ms.Tensor(batches(1)[0])
    output = fake(x).asnumpy()
    converted = ptq.convert(fake)
    assert converted is not fake
    assert fake.body[0].weight.dtype == ms.float32
    np.testing.assert_array_equal(fake(x).asnumpy(), output)


def test_result_does_not_depend_on_training_mode():
    """Calibration ignores dropout, and the caller's training flag stays set."""
    network = nn.SequentialCell(nn.Dropout(p=0.5), Mlp())
    network.set_train()
    data = batches(2)
    found = PTQ(PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True)).apply(network, datasets=data)
    assert found.training
    largest = max(np.abs(row).max() for row in data)
    np.testing.assert_allclose(found[1].body[0].input_scale.asnumpy(), largest / 127.5, rtol=1e-6)


def test_activation_that_the_network_overwrites_is_seen_in_time():
    """A linear's input counts as it was when the linear read it, though the network reuses its memory."""

    class Buffered(Mlp):
        def construct(self, x):
            buffer = x * 1
            y = self.body(buffer)
            buffer[:] = 0
            return y

    data = batches(2)
    found = PTQ(PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True)).apply(Buffered(), datasets=data)
    largest = max(np.abs(row).max() for row in data)
    np.testing.assert_allclose(found.body[0].input_scale.asnumpy(), largest / 127.5, rtol=1e-6)


# convert, DEPLOY, summary ---------------------------------------------------------------------------------


def test_convert_refuses_wrong_arguments(tmp_path: Any):
    """Only a Cell and the path of a file are converted."""
    ptq = PTQ()
    fake = ptq.apply(Mlp(), datasets=batches(1))
    with pytest.raises(TypeError, match="Cell"):
        ptq.convert(1)
    with pytest.raises(TypeError, match="ckpt_path"):
        ptq.convert(fake, ckpt_path=tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        ptq.convert(fake, ckpt_path=str(tmp_path / "missing.ckpt"))
    with pytest.raises(ValueError, match="no such file"):
        ptq.convert(fake, ckpt_path=str(tmp_path))
    with pytest.raises(ValueError, match="no quantised cell"):
        ptq.convert(Mlp())


def test_checkpoint_of_another_scheme_is_refused(tmp_path: Any):
    """A checkpoint that lacks a parameter, or holds it in another shape, is an error naming it."""
    w8, w4 = (PTQ(PTQConfig(weight_quant_dtype=dtype)) for dtype in (ms.int8, ms.qint4x2))
    static = PTQ(PTQConfig(act_quant_dtype=ms.int8))
    path = str(tmp_path / "w8.ckpt")
    ms.save_checkpoint(w8.convert(w8.apply(Mlp(), datasets=batches(1))), path)
    with pytest.raises(ValueError, match=r"body\.0\.weight"):
        w4.convert(w4.apply(Mlp(), datasets=batches(1)), ckpt_path=path)
    with pytest.raises(ValueError, match="input_scale"):
        static.convert(static.apply(Mlp(), datasets=batches(1)), ckpt_path=path)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="broken"):
        w8.convert(w8.apply(Mlp(), datasets=batches(1)), ckpt_path=str(broken))


def test_summary_refuses_what_is_no_cell():
    """Only a Cell has a summary."""
    with pytest.raises(TypeError, match="Cell"):
        PTQ().summary("network")


def test_summary_table(capsys: pytest.CaptureFixture[str]):
    """The table has a title and two columns, and NA for linears that are not quantised."""
    assert PTQ().summary(Mlp()) is None
    printed = capsys.readouterr().out
    assert "Network Quantization Summary" in printed
    assert re.search(r"\| +layer_name +\| +quant_type +\|", printed)
    assert strategies(printed) == {"body.0": "NA", "body.2": "NA"}


def test_summary_of_a_network_without_linears_prints_nothing(capsys: pytest.CaptureFixture[str]):
    """A network with nothing to report prints no table."""
    PTQ().summary(nn.ReLU())
    assert capsys.readouterr().out == ""


# Data -----------------------------------------------------------------------------------------------------


def test_helper_drives_the_data():
    """With a helper each row goes through generate, asked for one token without sampling."""
    helper = Helper()
    with_helper = PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(
        Mlp(), network_helper=helper, datasets=[{"input_ids": row} for row in batches(3)]
    )
    assert helper.asked == [{"max_new_tokens": 1, "do_sample": False}] * 3
    without = PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(Mlp(), datasets=batches(3))
    assert with_helper.body[2].input_scale.asnumpy() == without.body[2].input_scale.asnumpy()
