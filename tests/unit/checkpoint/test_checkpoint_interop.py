"""What is written loads in transformers, and computes what the integers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import tiny_checkpoint
from quantized_layers import LINEARS, SCHEMES, quantize

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear

torch = pytest.importorskip("torch", reason="needs the [interop] extra")
transformers = pytest.importorskip("transformers", reason="needs the [interop] extra")
pytest.importorskip("compressed_tensors", reason="needs the [interop] extra")

pytestmark = pytest.mark.interop


def publish(source: Path, output: Path, policies: list[dict[str, QuantPolicy | None]]) -> list[QuantizedLayer]:
    reader = CheckpointReader(source)
    output.mkdir()
    prints = Fingerprints(recipe="r", source="s", data="d")
    layers = [quantize(reader, layer, part) for layer, part in enumerate(policies)]
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


def fake_quantize(x: Any, linear: QuantizedLinear) -> Any:
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
            module.weight.data = torch.from_numpy(linear.dequantized()).to(module.weight.dtype)
            module.register_forward_pre_hook(lambda _, args, q=linear: (fake_quantize(args[0], q),))
    return model


def logits(model: Any) -> npt.NDArray[np.float32]:
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 128, (2, 24)))
    with torch.no_grad():
        return np.asarray(model(ids).logits.float().numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_what_the_integers_say(model_type: str, scheme: str, tmp_path: Path) -> None:
    """Logits of the loaded checkpoint are those of the float model with dequantised weights and inputs."""
    source = tiny_checkpoint(tmp_path / "source", model_type, hidden_size=128, tie=model_type == "qwen2")
    policy = QuantPolicy(**SCHEMES[scheme])
    layers = publish(source, tmp_path / "run", [dict.fromkeys(LINEARS, policy)] * 2)
    # compressed-tensors 0.20 gives packed zero points their unpacked shape while the model is on the meta device, and
    # transformers 5.23 then refuses any such checkpoint; on its other way in, weights are dequantised as they load.
    packed_zero_points = policy.act_quant_dtype is None and not policy.weight_symmetric
    model = load(tmp_path / "run" / "compressed-tensors", dequantize=packed_zero_points)
    found, wanted = logits(model), logits(reference(source, layers))
    # A value that falls on a rounding edge may take the neighbouring step: a few of many, never all.
    assert np.median(np.abs(found - wanted)) < 2e-5 * np.abs(wanted).max()
    assert np.abs(found - wanted).max() < (1e-4 if policy.act_quant_dtype is None else 0.05) * np.abs(wanted).max()
    assert np.abs(wanted - logits(load(source))).max() > 1e-3  # quantisation was there at all


GROUP_INDEX = {**SCHEMES["W4A16 per group"], "precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True)}


@pytest.mark.parametrize(
    ("scheme", "rules", "notes"),
    [
        (SCHEMES["W4A16 per group"], set(), []),
        (SCHEMES["W4A16 per group asymmetric"], set(), ["dequantize"]),
        (SCHEMES["W8A8 static asymmetric"], set(), []),
        (SCHEMES["W4A8 dynamic"], set(), []),
        (GROUP_INDEX, {"actorder"}, []),
    ],
)
def test_the_check_for_transformers_says_what_it_does(
    scheme: dict[str, Any], rules: set[str], notes: list[str], tmp_path: Path
) -> None:
    """What has a problem raises, what has a note raises unless loaded as it says, everything else loads as it is."""
    source = tiny_checkpoint(tmp_path / "source", hidden_size=128)
    publish(source, tmp_path / "run", [dict.fromkeys(LINEARS, QuantPolicy(**scheme))] * 2)
    directory = tmp_path / "run" / "compressed-tensors"
    report = check(directory, "transformers")
    assert ({problem.rule for problem in report.problems}, [note.rule for note in report.notes]) == (rules, notes)
    if rules or notes:
        with pytest.raises((RuntimeError, ValueError)):
            load(directory)
    if not rules:
        logits(load(directory, dequantize="dequantize" in notes))


def test_mixed_policies_load(tmp_path: Path) -> None:
    """A model with several schemes, and linears left in float, computes what the integers say."""
    source = tiny_checkpoint(tmp_path / "source", hidden_size=128)
    w8a8, w4 = QuantPolicy(**SCHEMES["W8A8 static"]), QuantPolicy(**SCHEMES["W4A16 per group"])
    first: dict[str, QuantPolicy | None] = {**dict.fromkeys(LINEARS, w8a8), "mlp.down_proj": None}
    second: dict[str, QuantPolicy | None] = {**dict.fromkeys(LINEARS, w8a8), "mlp.down_proj": w4}
    layers = publish(source, tmp_path / "run", [first, second])
    found, wanted = logits(load(tmp_path / "run" / "compressed-tensors")), logits(reference(source, layers))
    assert np.median(np.abs(found - wanted)) < 2e-5 * np.abs(wanted).max()


def test_bfloat16_weights_load_exactly(tmp_path: Path) -> None:
    """In a bfloat16 model the decompressed weights are the bfloat16 of code times scale."""
    source = tiny_checkpoint(tmp_path / "source", "mistral", "bfloat16", hidden_size=128)
    layers = publish(source, tmp_path / "run", [dict.fromkeys(LINEARS, QuantPolicy())] * 2)
    model = load(tmp_path / "run" / "compressed-tensors")
    logits(model)  # the first pass decompresses
    for layer in layers:
        for name, linear in layer.linears.items():
            weight = model.get_submodule(f"model.layers.{layer.layer}.{name}").weight
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, torch.from_numpy(linear.dequantized()).to(torch.bfloat16))


def test_key_value_scales_load(tmp_path: Path) -> None:
    """The KV cache's scales arrive in the attention modules, and values are rounded to their steps."""
    source = tiny_checkpoint(tmp_path / "source")
    reader = CheckpointReader(source)
    prints, formats = Fingerprints(recipe="r", source="s", data="d"), ["compressed-tensors"]
    (tmp_path / "run").mkdir()
    manifests = []
    for layer in range(2):
        quantized = quantize(reader, layer, dict.fromkeys(LINEARS, QuantPolicy()))
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
