from __future__ import annotations

import dataclasses
import logging
from typing import Any

import mindspore as ms
import pytest

import gs_dist.ptq
from gs_dist.ptq import (
    AWQConfig,
    BackendTarget,
    GPTQQuantConfig,
    NetworkHelper,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    SmoothQuantConfig,
)

W4A8 = {
    "weight_quant_dtype": ms.qint4x2,
    "act_quant_dtype": ms.int8,
    "act_quant_granularity": QuantGranularity.PER_TOKEN,
    "precision_recovery": PrecisionRecovery.GPTQ,
    "algo_args": GPTQQuantConfig(desc_act=True, static_groups=True),
}


def test_names_are_those_of_golden_stick():
    """Everything a program imports from mindspore_gs.ptq can be imported from gs_dist.ptq."""
    names = {
        "PTQConfig",
        "PTQMode",
        "OutliersSuppressionType",
        "PrecisionRecovery",
        "QuantGranularity",
        "AWQConfig",
        "GPTQQuantConfig",
        "SmoothQuantConfig",
        "NetworkHelper",
        "BackendTarget",
    }
    assert names <= set(gs_dist.ptq.__all__)


def test_fields_and_defaults_are_those_of_golden_stick():
    """PTQConfig's positional fields come in Golden Stick's order with Golden Stick's defaults."""
    config = PTQConfig()
    expected = {
        "mode": PTQMode.QUANTIZE,
        "backend": BackendTarget.ASCEND,
        "opname_blacklist": [],
        "algo_args": {},
        "weight_quant_dtype": ms.int8,
        "kvcache_quant_dtype": None,
        "act_quant_dtype": None,
        "precision_recovery": PrecisionRecovery.NONE,
        "outliers_suppression": OutliersSuppressionType.NONE,
        "weight_quant_granularity": QuantGranularity.PER_CHANNEL,
        "kvcache_quant_granularity": QuantGranularity.PER_CHANNEL,
        "act_quant_granularity": QuantGranularity.PER_TENSOR,
        "group_size": 0,
        "weight_clip": False,
    }
    positional = [f.name for f in dataclasses.fields(config) if not f.kw_only]
    assert positional == list(expected)
    assert {name: getattr(config, name) for name in positional} == expected


def test_enumerations_have_upstream_values():
    """Values and text of the enumerations are those that upstream's programs compare with."""
    assert [m.value for m in PTQMode] == ["quantize", "deploy"]
    assert [m.value for m in BackendTarget] == ["none", "ascend"]
    assert [str(m) for m in QuantGranularity] == ["per_tensor", "per_channel", "per_token", "per_group"]
    assert QuantGranularity.from_str("Per_Group") is QuantGranularity.PER_GROUP
    assert QuantGranularity.from_str("per_row") is None
    assert OutliersSuppressionType.from_str("SMOOTH") is OutliersSuppressionType.SMOOTH
    assert OutliersSuppressionType.from_str("?") is OutliersSuppressionType.NONE
    assert PrecisionRecovery.from_str("GPTQ") is PrecisionRecovery.GPTQ


@pytest.mark.parametrize(
    ("fields", "exception", "says"),
    [
        pytest.param({"mode": "quantize"}, ValueError, "PTQMode", id="C1 mode"),
        pytest.param({"backend": "ascend"}, ValueError, "BackendTarget", id="C2 backend"),
        pytest.param({"weight_quant_dtype": ms.float16}, ValueError, "weight_quant_dtype", id="C3 weight"),
        pytest.param({"weight_quant_dtype": "int8"}, ValueError, "weight_quant_dtype", id="C3 text"),
        pytest.param({"weight_quant_dtype": ["1"]}, ValueError, "weight_quant_dtype", id="C3 list"),
        pytest.param({"kvcache_quant_dtype": ms.qint4x2}, ValueError, "kvcache_quant_dtype", id="C3 kvcache"),
        pytest.param({"act_quant_dtype": ms.qint4x2}, ValueError, "act_quant_dtype", id="C3 act"),
        pytest.param({"opname_blacklist": "lm_head"}, TypeError, "opname_blacklist", id="C4 text"),
        pytest.param({"opname_blacklist": [1]}, TypeError, "opname_blacklist", id="C4 entry"),
        pytest.param({"outliers_suppression": "smooth"}, TypeError, "outliers_suppression", id="C5"),
        pytest.param({"group_size": "64"}, TypeError, "group_size", id="C6 text"),
        pytest.param({"group_size": True}, ValueError, "group_size", id="C6 bool reaches C13"),
        pytest.param({"weight_clip": 1}, TypeError, "weight_clip", id="C7"),
        pytest.param(
            {"act_quant_granularity": QuantGranularity.PER_CHANNEL}, ValueError, "act_quant_granularity", id="C8 act"
        ),
        pytest.param(
            {"weight_quant_granularity": QuantGranularity.PER_TOKEN},
            ValueError,
            "weight_quant_granularity",
            id="C8 weight",
        ),
        pytest.param(
            {"kvcache_quant_granularity": QuantGranularity.PER_GROUP},
            ValueError,
            "kvcache_quant_granularity",
            id="C8 kvcache",
        ),
        pytest.param(
            {"weight_quant_granularity": "per_channel"},
            ValueError,
            "weight_quant_granularity",
            id="C8 a str is no member",
        ),
        pytest.param(
            {"act_quant_granularity": QuantGranularity.PER_TOKEN}, ValueError, "act_quant_dtype", id="C9 act is float"
        ),
        pytest.param(
            {
                "act_quant_granularity": QuantGranularity.PER_TOKEN,
                "act_quant_dtype": ms.int8,
                "weight_quant_dtype": None,
            },
            ValueError,
            "weight_quant_dtype",
            id="C9 weight is float",
        ),
        pytest.param(
            {
                "act_quant_dtype": ms.int8,
                "weight_quant_granularity": QuantGranularity.PER_GROUP,
                "group_size": 64,
            },
            ValueError,
            "PER_CHANNEL",
            id="C10",
        ),
        pytest.param(
            {"kvcache_quant_granularity": QuantGranularity.PER_TOKEN}, ValueError, "kvcache_quant_dtype", id="C11"
        ),
        pytest.param({"group_size": 64}, ValueError, "group_size", id="C13"),
        pytest.param(
            {"weight_quant_granularity": QuantGranularity.PER_GROUP, "group_size": 32}, ValueError, "128", id="C14"
        ),
        pytest.param({"weight_quant_granularity": QuantGranularity.PER_GROUP}, ValueError, "128", id="C14 no size"),
        pytest.param({**W4A8, "precision_recovery": PrecisionRecovery.NONE}, ValueError, "GPTQ", id="C18 no GPTQ"),
        pytest.param(
            {**W4A8, "algo_args": {"desc_act": True, "static_groups": True}},
            ValueError,
            "GPTQQuantConfig",
            id="C18 a dict",
        ),
        pytest.param({**W4A8, "algo_args": {}}, ValueError, "desc_act", id="C18 defaults lack desc_act"),
        pytest.param(
            {**W4A8, "act_quant_granularity": QuantGranularity.PER_TENSOR}, ValueError, "PER_TOKEN", id="C18 per tensor"
        ),
        pytest.param({"precision_recovery": "gptq"}, TypeError, "precision_recovery", id="C19"),
        pytest.param({**W4A8, "precision_recovery": "gptq"}, ValueError, "GPTQ", id="C19 comes after C18"),
        pytest.param({"algo_args": None}, ValueError, "algo_args", id="C20 None"),
        pytest.param({"algo_args": [1]}, ValueError, "algo_args", id="C20 list"),
        pytest.param({"algo_args": AWQConfig}, ValueError, "algo_args", id="C20 a class"),
        pytest.param({"act_range": "widest"}, ValueError, "act_range", id="act_range"),
    ],
)
def test_what_ptqconfig_refuses(fields: dict[str, Any], exception: type[Exception], says: str):
    """A config that breaks a rule of the reference page raises that page's exception, naming the setting."""
    with pytest.raises(exception, match=says) as caught:
        PTQConfig(**fields)
    assert type(caught.value) is exception


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"weight_quant_dtype": None}, id="nothing quantised"),
        pytest.param({"opname_blacklist": ("lm_head",)}, id="a tuple"),
        pytest.param({"weight_quant_granularity": QuantGranularity.PER_GROUP, "group_size": 256}, id="groups of 256"),
        pytest.param(W4A8, id="W4A8"),
        pytest.param(
            {**W4A8, "weight_quant_granularity": QuantGranularity.PER_GROUP, "group_size": 64}, id="W4A8 in groups"
        ),
        pytest.param({"kvcache_quant_dtype": ms.int8, "weight_quant_dtype": None}, id="KV cache alone"),
    ],
)
def test_what_ptqconfig_accepts(fields: dict[str, Any]):
    """A config that the reference page allows is made, and reads as settings of the solvers."""
    policy = PTQConfig(**fields).policy
    assert policy.group_size == fields.get("group_size", 0)


def test_algorithm_dataclass_becomes_a_dict():
    """algo_args given as a dataclass is kept as a dict of its fields."""
    assert PTQConfig(algo_args=SmoothQuantConfig(alpha=0.75)).algo_args == {"alpha": 0.75}


def test_gptq_without_arguments_takes_defaults_and_says_so(caplog: pytest.LogCaptureFixture):
    """GPTQ with empty algo_args uses the defaults of GPTQQuantConfig, with a warning (C15)."""
    with caplog.at_level(logging.WARNING):
        config = PTQConfig(weight_quant_dtype=ms.qint4x2, precision_recovery=PrecisionRecovery.GPTQ)
    assert config.algo_args == dataclasses.asdict(GPTQQuantConfig())
    assert "GPTQQuantConfig" in caplog.text


def test_gptq_arguments_without_gptq_are_warned_about(caplog: pytest.LogCaptureFixture):
    """A GPTQQuantConfig without precision_recovery GPTQ is accepted with a warning (C16)."""
    with caplog.at_level(logging.WARNING):
        PTQConfig(algo_args=GPTQQuantConfig())
    assert "precision_recovery" in caplog.text


def test_per_token_kv_cache_in_quantize_mode_is_warned_about(caplog: pytest.LogCaptureFixture):
    """A per-token KV cache needs no calibration; QUANTIZE mode says so and goes on (C12)."""
    with caplog.at_level(logging.WARNING):
        PTQConfig(kvcache_quant_dtype=ms.int8, kvcache_quant_granularity=QuantGranularity.PER_TOKEN)
    assert "PER_TOKEN" in caplog.text


def test_config_cannot_be_assigned_to():
    """A checked config stays as it was checked."""
    config = PTQConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group_size = 64  # type: ignore[misc]  # the point of the test


def test_config_keeps_its_own_copies():
    """What the caller later does to his list and dict does not reach the config."""
    blacklist, args = ["lm_head"], {"alpha": 0.5}
    config = PTQConfig(opname_blacklist=blacklist, algo_args=args)
    blacklist.append("w2")
    args["alpha"] = 0.1
    assert config.opname_blacklist == ["lm_head"]
    assert config.algo_args == {"alpha": 0.5}


def test_policy_carries_every_setting():
    """The solvers' policy says what the config says, data types by name."""
    config = PTQConfig(
        weight_quant_dtype=ms.qint4x2,
        weight_quant_granularity=QuantGranularity.PER_GROUP,
        group_size=128,
        outliers_suppression=OutliersSuppressionType.AWQ,
        algo_args=AWQConfig(duo_scaling=False, smooth_alpha=0.25),
        weight_symmetric=False,
    )
    policy = config.policy
    assert (policy.weight_quant_dtype, policy.act_quant_dtype, policy.kvcache_quant_dtype) == ("qint4x2", None, None)
    assert (policy.weight_quant_granularity, policy.group_size) == ("per_group", 128)
    assert policy.outliers_suppression is OutliersSuppressionType.AWQ
    assert (policy.algo_args.duo_scaling, policy.algo_args.smooth_alpha) == (False, 0.25)
    assert not policy.weight_symmetric


def test_static_activations_have_a_zero_point_as_upstream():
    """Activations are asymmetric unless asked otherwise, as Golden Stick's are."""
    assert not PTQConfig(act_quant_dtype=ms.int8).policy.act_symmetric
    assert PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True).policy.act_symmetric


def test_unknown_algorithm_argument_names_the_nearest():
    """A misspelt key of algo_args is refused with the key that was meant."""
    with pytest.raises(ValueError, match="'smooth_alpha'"):
        _ = PTQConfig(algo_args={"smooth_alfa": 0.5}).policy


def test_algorithm_argument_of_wrong_value_is_named():
    """A value of algo_args outside its range is refused by name."""
    with pytest.raises(ValueError, match=r"alpha"):
        _ = PTQConfig(algo_args={"alpha": 1.5}).policy


@pytest.mark.parametrize(
    ("make", "exception"),
    [
        (lambda: AWQConfig(duo_scaling=1), TypeError),
        (lambda: AWQConfig(smooth_alpha=1), TypeError),
        (lambda: AWQConfig(weight_clip_ratio="1"), TypeError),
        (lambda: AWQConfig(smooth_alpha=["a"]), TypeError),
        (lambda: AWQConfig(smooth_alpha=1.5), ValueError),
        (lambda: AWQConfig(weight_clip_ratio=[0.5, -0.1]), ValueError),
        (lambda: AWQConfig(smooth_alpha=[]), ValueError),
        (lambda: GPTQQuantConfig(block_size=128.0), TypeError),
        (lambda: GPTQQuantConfig(desc_act=1), TypeError),
        (lambda: GPTQQuantConfig(static_groups="no"), TypeError),
        (lambda: GPTQQuantConfig(damp_percent=1), TypeError),
        (lambda: GPTQQuantConfig(block_size=-1), ValueError),
        (lambda: GPTQQuantConfig(block_size=0), ValueError),
        (lambda: GPTQQuantConfig(damp_percent=1.1), ValueError),
        (lambda: SmoothQuantConfig(alpha=1), TypeError),
        (lambda: SmoothQuantConfig(alpha=1.2), ValueError),
    ],
)
def test_what_algorithm_configs_refuse(make: Any, exception: type[Exception]):
    """Arguments of a wrong type are TypeErrors, values outside the range are ValueErrors."""
    with pytest.raises(exception):
        make()


def test_algorithm_defaults_are_those_of_golden_stick():
    """Search grids and GPTQ settings default to Golden Stick's."""
    assert AWQConfig().smooth_alpha == [i / 20 for i in range(20)]
    assert AWQConfig().weight_clip_ratio == [1 - i / 20 for i in range(10)]
    assert AWQConfig().duo_scaling is True
    assert GPTQQuantConfig() == GPTQQuantConfig(128, False, 0.01, False)
    assert SmoothQuantConfig().alpha == 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda helper: helper.create_network(),
        lambda helper: helper.get_spec("batch_size"),
        lambda helper: helper.create_tokenizer(),
        lambda helper: helper.generate(None, None),
        lambda helper: helper.assemble_inputs(None),
    ],
)
def test_network_helper_is_to_be_subclassed(call: Any):
    """Every method of the base helper raises NotImplementedError."""
    with pytest.raises(NotImplementedError):
        call(NetworkHelper())
