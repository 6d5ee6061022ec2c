"""What is written loads in transformers, and computes what the integers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import DTYPES, tiny_checkpoint

from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.policy import AlgoArgs, QuantPolicy
from gs_dist.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear

torch = pytest.importorskip("torch", reason="needs the [interop] extra")
transformers = pytest.importorskip("transformers", reason="needs the [interop] extra")
pytest.importorskip("compressed_tensors", reason="needs the [interop] extra")

pytestmark = pytest.mark.interop

GROUP = {"weight_quant_granularity": "per_group", "group_size": 64}
GPTQ = {"precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True, static_groups=True)}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A16": {},
    "W8A16 asymmetric": {"weight_symmetric": False},
    "W4A16 per channel": {"weight_quant_dtype": "qint4x2"},
    "W4A16 per group": {"weight_quant_dtype": "qint4x2", **GROUP},
    "W4A16 per group asymmetric": {"weight_quant_dtype": "qint4x2", "weight_symmetric": False, **GROUP},
    "W4A16 ordered by activation": {"weight_quant_dtype": "qint4x2", **GROUP, **GPTQ},
    "W8A8 static": {"act_quant_dtype": "int8"},
    "W8A8 static asymmetric": {"act_quant_dtype": "int8", "act_symmetric": False},
    "W8A8 dynamic": {"act_quant_dtype": "int8", "act_quant_granularity": "per_token"},
    "W4A8 dynamic": {
        "weight_quant_dtype": "qint4x2",
        "act_quant_dtype": "int8",
        "act_quant_granularity": "per_token",
        **GROUP,
        **GPTQ,
    },
}


def round_linear(
    weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, policy: QuantPolicy, dtype: str
) -> QuantizedLinear:
    rows, columns = weight.shape
    groups = columns // policy.group_size if policy.group_size else 1
    bottom, top = -(2 ** (policy.weight_bits - 1)), 2 ** (policy.weight_bits - 1) - 1
    blocks = weight.astype(np.float32).reshape(rows, groups, -1)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    span = high - low if not policy.weight_symmetric else 2 * np.maximum(high, -low)
    scale = (span / (top - bottom)).astype(DTYPES[dtype]).astype(np.float32)
    zero = np.zeros_like(scale) if policy.weight_symmetric else np.clip(np.rint(bottom - low / scale), bottom, top)
    codes = np.clip(np.rint(blocks / scale[:, :, None] + zero[:, :, None]), bottom, top)
    return QuantizedLinear(
        policy=policy,
        codes=codes.reshape(rows, columns).astype(np.int8),
        scale=scale,
        zero_point=None if policy.weight_symmetric else zero.astype(np.int8),
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=float(np.float32(0.03125)) if policy.is_static else None,
        input_zero_point=(0 if policy.act_symmetric else 5) if policy.is_static else None,
    )


def quantise(reader: CheckpointReader, layer: int, policies: dict[str, QuantPolicy | None]) -> QuantizedLayer:
    tensors = reader.read_layer(layer)
    linears = {}
    for name, policy in policies.items():
        if policy is not None:
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
            linears[name] = round_linear(weight, bias, policy, reader.architecture.dtype)
    return QuantizedLayer(layer=layer, linears=linears, tensors=tensors)


def publish(source: Path, output: Path, policies: list[dict[str, QuantPolicy | None]]) -> list[QuantizedLayer]:
    reader = CheckpointReader(source)
    output.mkdir()
    prints = Fingerprints(recipe="r", source="s", data="d")
    layers = [quantise(reader, layer, part) for layer, part in enumerate(policies)]
    formats = ["compressed-tensors"]
    manifests = [publish_layer(output, layer, reader.architecture, formats, prints) for layer in layers]
    outer = publish_outer(output, reader, formats, prints)
    merge_checkpoint(output, formats[0], reader, manifests, outer)
    return layers


def load(directory: Path, *, dequantize: bool = False) -> Any:
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", **options
    )
    return model.eval()


def fake_quantise(x: Any, linear: QuantizedLinear) -> Any:
    if linear.policy.act_quant_dtype is None:
        return x
    if linear.policy.is_static:
        scale, zero = linear.input_scale, linear.input_zero_point or 0
    else:
        scale, zero = x.abs().amax(dim=-1, keepdim=True) / 127.5, 0
    return (torch.clamp(torch.round(x / scale + zero), -128, 127) - zero) * scale


def reference(source: Path, layers: list[QuantizedLayer]) -> Any:
    """The float model with weights put through the integers, and activations through hooks."""
    model = load(source)
    for layer in layers:
        for name, linear in layer.linears.items():
            module = model.get_submodule(f"model.layers.{layer.layer}.{name}")
            module.weight.data = torch.from_numpy(linear.dequantised()).to(module.weight.dtype)
            module.register_forward_pre_hook(lambda _, args, q=linear: (fake_quantise(args[0], q),))
    return model


def logits(model: Any) -> npt.NDArray[np.float32]:
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 128, (2, 24)))
    with torch.no_grad():
        return np.asarray(model(ids).logits.float().numpy())


NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
NAMES += ["mlp.down_proj"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_what_the_integers_say(model_type: str, scheme: str, tmp_path: Path) -> None:
    """Logits of the loaded checkpoint are those of the float model with dequantised weights and inputs."""
    source = tiny_checkpoint(tmp_path / "source", model_type, hidden_size=128, tie=model_type == "qwen2")
    policy = QuantPolicy(**SCHEMES[scheme])
    layers = publish(source, tmp_path / "run", [dict.fromkeys(NAMES, policy)] * 2)
    # compressed-tensors 0.20 gives packed zero points their unpacked shape while the model is on the meta device, and
    # transformers 5.23 then refuses any such checkpoint; on its other way in, weights are dequantised as they load.
    packed_zero_points = policy.act_quant_dtype is None and not policy.weight_symmetric
    model = load(tmp_path / "run" / "compressed-tensors", dequantize=packed_zero_points)
    found, wanted = logits(model), logits(reference(source, layers))
    # A value that falls on a rounding edge may take the neighbouring step: a few of many, never all.
    assert np.median(np.abs(found - wanted)) < 2e-5 * np.abs(wanted).max()
    assert np.abs(found - wanted).max() < (1e-4 if policy.act_quant_dtype is None else 0.05) * np.abs(wanted).max()
    assert np.abs(wanted - logits(load(source))).max() > 1e-3  # quantisation was there at all


def test_mixed_policies_load(tmp_path: Path) -> None:
    """A model with several schemes, and linears left in float, computes what the integers say."""
    source = tiny_checkpoint(tmp_path / "source", hidden_size=128)
    w8a8, w4 = QuantPolicy(**SCHEMES["W8A8 static"]), QuantPolicy(**SCHEMES["W4A16 per group"])
    first: dict[str, QuantPolicy | None] = {**dict.fromkeys(NAMES, w8a8), "mlp.down_proj": None}
    second: dict[str, QuantPolicy | None] = {**dict.fromkeys(NAMES, w8a8), "mlp.down_proj": w4}
    layers = publish(source, tmp_path / "run", [first, second])
    found, wanted = logits(load(tmp_path / "run" / "compressed-tensors")), logits(reference(source, layers))
    assert np.median(np.abs(found - wanted)) < 2e-5 * np.abs(wanted).max()


def test_bfloat16_weights_load_exactly(tmp_path: Path) -> None:
    """In a bfloat16 model the decompressed weights are the bfloat16 of code times scale."""
    source = tiny_checkpoint(tmp_path / "source", "mistral", "bfloat16", hidden_size=128)
    layers = publish(source, tmp_path / "run", [dict.fromkeys(NAMES, QuantPolicy())] * 2)
    model = load(tmp_path / "run" / "compressed-tensors")
    logits(model)  # the first pass decompresses
    for layer in layers:
        for name, linear in layer.linears.items():
            weight = model.get_submodule(f"model.layers.{layer.layer}.{name}").weight
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, torch.from_numpy(linear.dequantised()).to(torch.bfloat16))


def test_key_value_scales_load(tmp_path: Path) -> None:
    """The KV cache's scales arrive in the attention modules, and values are rounded to their steps."""
    source = tiny_checkpoint(tmp_path / "source")
    reader = CheckpointReader(source)
    prints, formats = Fingerprints(recipe="r", source="s", data="d"), ["compressed-tensors"]
    (tmp_path / "run").mkdir()
    manifests = []
    for layer in range(2):
        quantized = quantise(reader, layer, dict.fromkeys(NAMES, QuantPolicy()))
        scales = np.full(reader.architecture.kv_size, 0.25, dtype=np.float32)
        cache = QuantizedKVCache(key_scale=scales, value_scale=scales * 0.5)
        quantized = QuantizedLayer(layer=layer, linears=quantized.linears, tensors=quantized.tensors, kv_cache=cache)
        manifests.append(publish_layer(tmp_path / "run", quantized, reader.architecture, formats, prints))
    outer = publish_outer(tmp_path / "run", reader, formats, prints)
    merge_checkpoint(tmp_path / "run", formats[0], reader, manifests, outer)
    model = load(tmp_path / "run" / "compressed-tensors")
    attention = model.model.layers[1].self_attn
    assert attention.k_scale.item() == 0.25
    assert attention.v_scale.item() == 0.125
    with torch.no_grad():
        cached = model(torch.arange(10)[None], use_cache=True).past_key_values
    values = cached.layers[0].values / 0.125
    assert torch.allclose(values, values.round())
