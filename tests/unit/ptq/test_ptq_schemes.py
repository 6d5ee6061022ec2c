from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from ptq_networks import (
    CHANNELS,
    Decoder,
    DecoderLayer,
    Helper,
    Mlp,
    batches,
    parameter_values,
    relative_error,
    strategies,
)

from gs_dist.ptq import (
    PTQ,
    AWQConfig,
    GPTQQuantConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    SmoothQuantConfig,
)

W8A8 = {"act_quant_dtype": ms.int8}
GROUPS = {
    "weight_quant_dtype": ms.qint4x2,
    "weight_quant_granularity": QuantGranularity.PER_GROUP,
    "group_size": 64,
}
SCHEMES = {
    "W8-perchannel": {},
    "W8-pergroup": {"weight_quant_granularity": QuantGranularity.PER_GROUP, "group_size": 64},
    "W8-perchannel-A8-pertensor": W8A8,
    "W8-perchannel-A8-pertoken": {**W8A8, "act_quant_granularity": QuantGranularity.PER_TOKEN},
    "SmoothQuant-W8-perchannel-A8-pertensor": {
        **W8A8,
        "outliers_suppression": OutliersSuppressionType.SMOOTH,
        "algo_args": SmoothQuantConfig(alpha=0.5),
    },
    "SmoothQuant-W8-perchannel-A8-pertoken": {
        **W8A8,
        "act_quant_granularity": QuantGranularity.PER_TOKEN,
        "outliers_suppression": OutliersSuppressionType.SMOOTH,
    },
    "OSL-wclip-W8-perchannel-A8-pertensor": {
        **W8A8,
        "outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
    },
    "OutlierSuppressionPlus-W8-perchannel-A8-pertensor": {
        **W8A8,
        "outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS,
    },
    "W4-perchannel": {"weight_quant_dtype": ms.qint4x2},
    "wclip-W4-perchannel": {"weight_quant_dtype": ms.qint4x2, "weight_clip": True},
    "W4-pergroup": {**GROUPS, "weight_symmetric": False},
    "AWQ-wclip-W4-pergroup": {
        **GROUPS,
        "outliers_suppression": OutliersSuppressionType.AWQ,
        "algo_args": AWQConfig(smooth_alpha=[0.0, 0.5]),
    },
    "GPTQ-W4-pergroup": {
        **GROUPS,
        "precision_recovery": PrecisionRecovery.GPTQ,
        "algo_args": GPTQQuantConfig(desc_act=True),
    },
    "GPTQ-W4-perchannel-A8-pertoken": {
        "weight_quant_dtype": ms.qint4x2,
        "act_quant_dtype": ms.int8,
        "act_quant_granularity": QuantGranularity.PER_TOKEN,
        "precision_recovery": PrecisionRecovery.GPTQ,
        "algo_args": GPTQQuantConfig(desc_act=True, static_groups=True),
    },
}


@pytest.mark.parametrize("strategy", SCHEMES)
def test_every_scheme_from_apply_to_summary(strategy: str, capsys: pytest.CaptureFixture[str]):
    """Fake-quantised and converted networks agree to the bit, come close to the float one, and say what they are."""
    network = Decoder()
    ptq = PTQ(PTQConfig(**SCHEMES[strategy]))
    ptq.decoder_layer_types.append(DecoderLayer)
    x = ms.Tensor(batches(1, seed=9)[0])
    wanted = network(x).asnumpy()
    fake = ptq.apply(network, datasets=batches(2))
    converted = ptq.convert(fake)
    rows = strategies(capsys.readouterr().out)
    assert rows["layers.1.down_proj"] == strategy
    assert {rows["head"], rows["layers.0.cache"]} == {"NA"}
    np.testing.assert_array_equal(converted(x).asnumpy(), fake(x).asnumpy())
    found = fake(x).asnumpy()
    assert 0 < relative_error(found, wanted) < (0.05 if "W8" in strategy else 0.15)
    codes = converted.layers[0].q_proj.weight
    assert codes.dtype == ms.int8
    assert codes.shape == ((CHANNELS, CHANNELS // 2) if "W4" in strategy else (CHANNELS, CHANNELS))


@pytest.mark.parametrize("strategy", ["GPTQ-W4-pergroup", "SmoothQuant-W8-perchannel-A8-pertensor"])
def test_quantized_propagation_shows_each_layer_the_quantized_ones_before_it(strategy: str):
    """Layer by layer is what quantising the second layer of a network whose first one is quantised already gives."""
    network, x = Decoder(), ms.Tensor(batches(1, seed=9)[0])

    def applied(network: Any, leave: str | None = None, **kwargs: Any) -> Any:
        ptq = PTQ(PTQConfig(**SCHEMES[strategy]), None if leave is None else OrderedDict({leave: None}))
        ptq.decoder_layer_types.append(DecoderLayer)
        return ptq.apply(network, datasets=batches(3), **kwargs)

    found = applied(network, propagation="quantized")
    by_hand = applied(applied(network, leave=r"layers\.1\."))
    np.testing.assert_array_equal(found(x).asnumpy(), by_hand(x).asnumpy())
    original = applied(network, propagation="original")(x).asnumpy()
    np.testing.assert_array_equal(applied(network)(x).asnumpy(), original)
    assert not np.array_equal(found(x).asnumpy(), original)


def round_reference(x: np.ndarray, scale: Any, zero: Any = 0.0) -> np.ndarray:
    """Int8 rounding and back in float64."""
    return (np.clip(np.rint(x / scale + zero), -128, 127) - zero) * scale


def test_w8a8_numbers_against_a_numpy_reference():
    """Static W8A8 equals min-max scales and rounding written out here in float64."""
    network, data = Mlp(), batches()
    fake = PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(network, datasets=data)
    first, second = network.body[0], network.body[2]

    def float_layers(x: np.ndarray) -> list[np.ndarray]:
        hidden = np.tanh(x @ first.weight.asnumpy().T + first.bias.asnumpy())
        return [x, hidden]

    seen = [float_layers(x.astype(np.float64)) for x in data]
    x = batches(1, seed=5)[0].astype(np.float64)
    for index, cell in enumerate((first, second)):
        weight = cell.weight.asnumpy().astype(np.float64)
        weight = round_reference(weight, np.abs(weight).max(axis=1, keepdims=True) / 127.5)
        low = min(0.0, *(row[index].min() for row in seen))
        high = max(0.0, *(row[index].max() for row in seen))
        scale = (high - low) / 255
        x = round_reference(x, scale, np.rint(-128 - low / scale)) @ weight.T + cell.bias.asnumpy()
        x = np.tanh(x) if index == 0 else x
    assert relative_error(fake(ms.Tensor(batches(1, seed=5)[0])).asnumpy(), x) < 2e-3


def test_smoothquant_numbers_against_a_numpy_reference():
    """SmoothQuant with an explicit scale equals the formula of the paper written out here."""
    network, data = Mlp(has_bias=False), batches()
    config = PTQConfig(
        act_quant_dtype=ms.int8,
        act_quant_granularity=QuantGranularity.PER_TOKEN,
        outliers_suppression=OutliersSuppressionType.SMOOTH,
        algo_args=SmoothQuantConfig(alpha=0.75),
        opname_blacklist=["body.2"],
    )
    fake = PTQ(config).apply(network, datasets=data)
    weight = network.body[0].weight.asnumpy().astype(np.float64)
    x_max = np.abs(np.concatenate(data).reshape(-1, CHANNELS)).max(axis=0)
    smooth = x_max**0.75 / np.abs(weight).max(axis=0) ** 0.25
    np.testing.assert_allclose(fake.body[0].smooth_scale.asnumpy(), smooth, rtol=1e-5)
    weight = weight * smooth
    weight = round_reference(weight, np.abs(weight).max(axis=1, keepdims=True) / 127.5)
    x = batches(1, seed=5)[0].astype(np.float64) / smooth
    x = round_reference(x, np.abs(x).max(axis=-1, keepdims=True) / 127.5)
    wanted = np.tanh(x @ weight.T) @ network.body[2].weight.asnumpy().T
    assert relative_error(fake(ms.Tensor(batches(1, seed=5)[0])).asnumpy(), wanted) < 2e-3


def test_smoothquant_tames_an_outlier_channel():
    """With one channel a hundred times the others, SmoothQuant's static W8A8 is better than plain W8A8."""
    network, data = Mlp(), batches(outlier=100.0)
    x = ms.Tensor(data[0])
    errors = {}
    for suppression in (OutliersSuppressionType.NONE, OutliersSuppressionType.SMOOTH):
        config = PTQConfig(act_quant_dtype=ms.int8, outliers_suppression=suppression)
        fake = PTQ(config).apply(network, datasets=data)
        errors[suppression] = relative_error(fake(x).asnumpy(), network(x).asnumpy())
    assert errors[OutliersSuppressionType.SMOOTH] < errors[OutliersSuppressionType.NONE] / 2


def test_kv_cache_is_rounded_per_channel(capsys: pytest.CaptureFixture[str]):
    """Keys and values pass an int8 cache with the scale absmax/127.5 of each channel; linears stay."""
    network, data = Decoder(), batches()
    ptq = PTQ(PTQConfig(weight_quant_dtype=None, kvcache_quant_dtype=ms.int8))
    ptq.decoder_layer_types.append(DecoderLayer)
    fake = ptq.apply(network, datasets=data)
    values = np.abs(np.concatenate(data).reshape(-1, CHANNELS)).max(axis=0)
    np.testing.assert_allclose(fake.layers[0].cache.value_scale.asnumpy(), values / 127.5, rtol=1e-6)
    key = data[0]
    rounded, _ = fake.layers[0].cache(ms.Tensor(key), ms.Tensor(key))
    scale = fake.layers[0].cache.key_scale.asnumpy()
    np.testing.assert_allclose(rounded.asnumpy(), round_reference(key, scale), rtol=1e-5, atol=1e-6)
    ptq.summary(fake)
    rows = strategies(capsys.readouterr().out)
    assert (rows["layers.0.cache"], rows["layers.0.q_proj"]) == ("C8-perchannel", "NA")


def test_kv_cache_per_token_needs_no_statistics(capsys: pytest.CaptureFixture[str]):
    """A per-token cache is rounded with each token's own scale, together with quantised weights."""
    config = PTQConfig(kvcache_quant_dtype=ms.int8, kvcache_quant_granularity=QuantGranularity.PER_TOKEN)
    network = Decoder()
    ptq = PTQ(config)
    fake = ptq.convert(ptq.apply(network, datasets=batches(2)))
    rows = strategies(capsys.readouterr().out)
    assert (rows["layers.1.cache"], rows["layers.1.q_proj"]) == ("C8-pertoken", "W8-perchannel")
    x = batches(1)[0]
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
    rounded, _ = fake.layers[0].cache(ms.Tensor(x), ms.Tensor(x))
    np.testing.assert_allclose(rounded.asnumpy(), round_reference(x, scale), rtol=1e-5, atol=1e-6)


def test_static_cells_clip_what_calibration_never_saw():
    """A static input far outside the calibrated range saturates instead of wrapping around."""
    network, data = Mlp(), batches()
    fake = PTQ(PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True)).apply(network, datasets=data)
    largest = np.abs(np.concatenate(data)).max()
    seen = fake.body[0].rounded_input(ms.Tensor(np.full((1, CHANNELS), 1e4, np.float32))).asnumpy()
    np.testing.assert_allclose(seen, 127 / 127.5 * largest, rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("SmoothQuant-W8-perchannel-A8-pertensor", "ckpt"),
        ("OutlierSuppressionPlus-W8-perchannel-A8-pertensor", "safetensors"),
        ("GPTQ-W4-pergroup", "ckpt"),
        ("W4-pergroup", "safetensors"),
    ],
)
def test_checkpoint_loads_into_a_deployed_network(strategy: str, kind: str, tmp_path: Any):
    """What QUANTIZE found and saved loads into the structure DEPLOY makes, and computes alike."""
    quantize = PTQ(PTQConfig(**SCHEMES[strategy]))
    quantize.decoder_layer_types.append(DecoderLayer)  # the head stays, and comes from the checkpoint all the same
    network = Decoder(seed=0)
    trained = quantize.convert(quantize.apply(network, datasets=batches(2)))
    path = str(tmp_path / f"quantised.{kind}")
    ms.save_checkpoint(trained, path, format=kind)
    fresh = Decoder(seed=7)
    values = parameter_values(fresh)
    deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, **SCHEMES[strategy]))
    deploy.decoder_layer_types.append(DecoderLayer)
    skeleton = deploy.apply(fresh, network_helper=Helper())
    x = ms.Tensor(batches(1, seed=9)[0])
    assert np.isnan(skeleton(x).asnumpy()).all(), "a network without its checkpoint must not look usable"
    loaded = deploy.convert(skeleton, ckpt_path=path)
    np.testing.assert_array_equal(loaded(x).asnumpy(), trained(x).asnumpy())
    assert all(np.array_equal(value, values[name]) for name, value in parameter_values(fresh).items())


@pytest.mark.parametrize(
    "strategy", ["SmoothQuant-W8-perchannel-A8-pertoken", "W8-perchannel-A8-pertensor", "GPTQ-W4-pergroup"]
)
def test_converted_network_compiles_and_exports(strategy: str, tmp_path: Path):
    """A converted network gives the same output in graph mode, and is exported as MINDIR."""
    ptq = PTQ(PTQConfig(**SCHEMES[strategy]))
    converted = ptq.convert(ptq.apply(Mlp(), datasets=batches(2)))
    x = ms.Tensor(batches(1, seed=9)[0])
    wanted = converted(x).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        np.testing.assert_allclose(converted(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)
        ms.export(converted, x, file_name=str(tmp_path / "network"), file_format="MINDIR")
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert (tmp_path / "network.mindir").stat().st_size > 0


def test_float16_network_stays_float16():
    """A float16 network is calibrated, and its scales are rounded to float16."""
    network = Mlp()
    for cell in (network.body[0], network.body[2]):
        for parameter in cell.get_parameters():
            parameter.set_dtype(ms.float16)
    data = [row.astype(np.float16) for row in batches(2)]
    fake = PTQ(PTQConfig(act_quant_dtype=ms.int8)).apply(network, datasets=data)
    x = ms.Tensor(data[0])
    found, wanted = fake(x), network(x)
    assert found.dtype == ms.float16
    assert relative_error(found.asnumpy(), wanted.asnumpy()) < 0.05
    scale = fake.body[0].converted().weight_scale.asnumpy()
    np.testing.assert_array_equal(scale, scale.astype(np.float16))
