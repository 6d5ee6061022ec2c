from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from runs import run_inline, small_recipe
from safetensors.numpy import load_file

from gs_dist.calibration.device import Device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.ptq import (
    PTQ,
    DecoderHelper,
    GPTQQuantConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
)
from gs_dist.ptq.cells import FakeQuantDense, linear_form
from gs_dist.ptq.kv_cache import QuantKVCache
from gs_dist.ptq.structure import copy_network

INDEX = "model.safetensors.index.json"
W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
DEPLOY_W4 = {
    "weight_quant_dtype": ms.qint4x2,
    "weight_quant_granularity": QuantGranularity.PER_GROUP,
    "group_size": 64,
}
STATIC = {"act_quant_dtype": "int8", "act_symmetric": False, "outliers_suppression": "smooth"}
PLUS = {"act_quant_dtype": "int8", "outliers_suppression": "outlier-suppression+"}
DEPLOY_PLUS = {
    "act_quant_dtype": ms.int8,
    "outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS,
}
DEPLOY_STATIC = {"act_quant_dtype": ms.int8, "outliers_suppression": OutliersSuppressionType.SMOOTH}
PER_TOKEN = {"act_quant_dtype": "int8", "act_quant_granularity": "per_token"}
DEPLOY_PER_TOKEN = {"act_quant_dtype": ms.int8, "act_quant_granularity": QuantGranularity.PER_TOKEN}
# What a job is told, and what a program tells PTQ to deploy it.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "golden-stick W8A8 static": ("golden-stick", STATIC, DEPLOY_STATIC),
    "golden-stick W8A16": ("golden-stick", {}, {}),
    "golden-stick W4A16": ("golden-stick", W4, DEPLOY_W4),
    "ascend W8A8 static": ("ascend", STATIC, DEPLOY_STATIC),
    "ascend W8A8 static, shifted by the biases of norms": ("ascend", PLUS, DEPLOY_PLUS),
    "ascend W8A8 dynamic": ("ascend", PER_TOKEN, DEPLOY_PER_TOKEN),
    "compressed-tensors W8A8 static": ("compressed-tensors", STATIC, DEPLOY_STATIC),
    "compressed-tensors W8A16 and KV cache": (
        "compressed-tensors",
        {"kvcache_quant_dtype": "int8"},
        {"kvcache_quant_dtype": ms.int8},
    ),
    "compressed-tensors W4A16 with zero points and group index": (
        "compressed-tensors",
        {**W4, "weight_symmetric": False, "precision_recovery": "gptq", "algo_args": {"desc_act": True}},
        {
            **DEPLOY_W4,
            "weight_symmetric": False,
            "precision_recovery": PrecisionRecovery.GPTQ,
            "algo_args": GPTQQuantConfig(desc_act=True),
        },
    ),
}


def published(directory: Path, name: str, ptq: dict[str, Any]) -> Path:
    """The model directory of a job over a tiny Llama; the float model is gone afterwards."""
    config = small_recipe(directory, num_layers=2, format=[name], ptq={"weight_quant_dtype": "int8", **ptq})
    run_inline(config)
    shutil.rmtree(config.model)
    return Path(config.output) / name


def deployed(model: Path, fields: dict[str, Any]) -> Any:
    helper = DecoderHelper(model)
    ptq = PTQ(PTQConfig(mode=PTQMode.DEPLOY, **fields))
    return ptq.convert(ptq.apply(helper.create_network(), network_helper=helper), ckpt_path=str(model / INDEX))


def fake_quantized(model: Path, name: str) -> Any:
    """The same network with every linear dequantised into a float one."""
    reader = CheckpointReader(model, quantized=True)
    network = DecoderHelper(model).create_network()
    cells, parameters = dict(network.cells_and_names()), {p.name: p for p in network.get_parameters()}
    exchanged: dict[str, Any] = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        decoded = codec_of(name).decode_layer(reader, layer)
        for linear, found in decoded.linears.items():
            form = linear_form(prefix + linear, cells[prefix + linear])
            form = replace(form, bias=form.bias or found.bias is not None)
            exchanged[prefix + linear] = FakeQuantDense(form, "", found)
        for tensor, array in decoded.tensors.items():
            parameters[prefix + tensor].set_data(ms.Tensor(np.array(array)))
        if decoded.kv_cache is not None:
            policy = next(iter(decoded.linears.values())).policy.model_copy(update={"kvcache_quant_dtype": "int8"})
            cache = QuantKVCache(f"{prefix}self_attn.cache", reader.architecture.kv_size, policy)
            cache.fill(decoded.kv_cache)
            exchanged[f"{prefix}self_attn.cache"] = cache
    return copy_network(network, exchanged)


def evaluated(model: Path, name: str, ids: np.ndarray) -> np.ndarray:
    """Logits by the network that measures perplexity."""
    reader = CheckpointReader(model, quantized=True)
    network = DecoderNetwork(reader.architecture, Device(kind=DeviceKind.CPU))
    outer = network.outer_weights(reader.read_outer())
    hidden = network.embed(outer, ids)
    for layer in range(reader.architecture.num_layers):
        weights = network.layer_weights(layer, {}, quantized=codec_of(name).decode_layer(reader, layer))
        hidden, _ = network.forward_layer(weights, hidden, capture=False)
    return np.asarray(network.logits(outer, hidden).asnumpy())


@pytest.mark.parametrize("case", CASES)
def test_published_model_is_deployed(case: str, tmp_path: Path) -> None:
    """A job's merged checkpoint loads into DEPLOY's network, whose logits are the fake-quantised network's to the bit.

    And those of the network that measures perplexity, but for values that fall on a rounding edge.
    """
    name, recipe, fields = CASES[case]
    model = published(tmp_path, name, recipe)
    network = deployed(model, fields)
    ids = np.random.default_rng(5).integers(0, 128, (2, 20)).astype(np.int32)
    logits = network(ms.Tensor(ids)).asnumpy()
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, fake_quantized(model, name)(ms.Tensor(ids)).asnumpy())
    difference = np.abs(logits - evaluated(model, name, ids))
    assert np.median(difference) < (5e-3 if "per_token" in recipe.values() else 1e-5) * np.abs(logits).max()


def test_cells_hold_the_integers_of_the_files(tmp_path: Path) -> None:
    """Codes and scales in the deployed cells are the tensors of the published shard, read with no help."""
    model = published(tmp_path, "golden-stick", STATIC)
    network = deployed(model, DEPLOY_STATIC)
    stored = {k: v for file in model.glob("layer-*.safetensors") for k, v in load_file(file).items()}
    for layer, cell in enumerate(network.model.layers):
        prefix = f"model.layers.{layer}.mlp.down_proj."
        held = cell.mlp.down_proj
        np.testing.assert_array_equal(held.weight.asnumpy(), stored[prefix + "weight"])
        np.testing.assert_array_equal(held.weight_scale.asnumpy()[:, 0], stored[prefix + "weight_scale"])
        np.testing.assert_array_equal(held.input_scale.asnumpy(), stored[prefix + "input_scale"][:1])
        np.testing.assert_array_equal(held.input_offset.asnumpy(), stored[prefix + "input_offset"][:1])


def test_network_of_another_scheme_is_refused(tmp_path: Path) -> None:
    """What was published and what the network was built for must agree, and the message says how they differ."""
    model = published(tmp_path, "golden-stick", {})
    for fields, says in (
        (DEPLOY_PER_TOKEN, r"q_proj was published as W8-perchannel.*built for W8-perchannel-A8-pertoken"),
        (DEPLOY_W4, "built for W4-pergroup of group_size 64"),
        ({"kvcache_quant_dtype": ms.int8}, "no KV cache scales.*kvcache_quant_dtype"),
        ({"opname_blacklist": ["down_proj"]}, r"down_proj was published as W8-perchannel.*a float linear"),
    ):
        with pytest.raises(CheckpointError, match=says):
            deployed(model, fields)


def test_zero_points_need_their_place(tmp_path: Path) -> None:
    """A symmetric network refuses inputs that were published with zero points, naming the setting."""
    model = published(tmp_path, "golden-stick", {**STATIC, "act_range": "minmax"})
    with pytest.raises(CheckpointError, match=r"input zero point.*act_symmetric"):
        deployed(model, {**DEPLOY_STATIC, "act_symmetric": True})


def test_float_model_is_not_a_published_one(tmp_path: Path) -> None:
    """The index of a float checkpoint is refused with what to give instead."""
    model = published(tmp_path, "golden-stick", {})
    network = DecoderHelper(model)
    ptq = PTQ(PTQConfig(mode=PTQMode.DEPLOY))
    skeleton = ptq.apply(network.create_network(), network_helper=network)
    (model / "quantization_description.json").unlink()
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    with pytest.raises(CheckpointError, match="holds a float model"):
        ptq.convert(skeleton, ckpt_path=str(model / INDEX))
