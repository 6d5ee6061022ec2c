"""compressed-tensors: packed words, tensors and config as its specification has them, and the way back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import DTYPES, tiny_checkpoint, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from quantized_layers import LINEARS, SCHEMES, quantize

from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.dialects.compressed_tensors.packing import pack_int32, packed_size, unpack_int32
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import write_safetensors
from gs_dist.errors import CheckpointError, UserError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer

FORMAT = codec_of("compressed-tensors")
PREFIX = "model.layers.0."


def architecture(**overrides: Any) -> DecoderArchitecture:
    return read_architecture(tiny_config(**{"hidden_size": 128, **overrides}))


def uniform(policy: QuantPolicy | None, num_layers: int = 2) -> dict[str, QuantPolicy | None]:
    return {f"model.layers.{layer}.{name}": policy for layer in range(num_layers) for name in LINEARS}


@pytest.mark.parametrize(
    ("codes", "bits", "word"),
    [
        ([1], 4, 9),
        ([1, 2, 3, 4], 4, 52137),
        (list(range(-8, 0)), 4, 1985229328),
        ([1, 2, 3, 4], 8, -2071756159),
        ([-128, -127, -126, -125], 8, 50462976),
    ],
)
def test_words_of_the_specification(codes: list[int], bits: int, word: int) -> None:
    """Values become unsigned and fill a word from its lowest bits, missing ones being zero bits."""
    packed = pack_int32(np.array([codes], dtype=np.int8), bits)
    assert packed.dtype == np.int32
    assert packed.tolist() == [[word]]


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_packing_is_undone(bits: int, rows: int, columns: int, seed: int) -> None:
    """Unpacking gives back any integers of that width, and words are as many as needed."""
    half = 1 << (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, (rows, columns)).astype(np.int8)
    packed = pack_int32(codes, bits)
    assert packed.shape == (rows, packed_size(columns, bits))
    np.testing.assert_array_equal(unpack_int32(packed, bits, columns), codes)
    words = [sum((int(c) + half) << (bits * i) for i, c in enumerate(row[: 32 // bits])) for row in codes]
    np.testing.assert_array_equal(packed[:, 0].view(np.uint32), words)


def test_other_widths_are_refused() -> None:
    """Only 4 and 8 bits are packed."""
    with pytest.raises(ValueError, match="3 bits"):
        pack_int32(np.zeros((1, 1), np.int8), 3)


TENSORS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    # Of the linear down_proj, (128, 192) in a bfloat16 model: name to dtype and shape.
    "W8A16": {
        "weight_packed": ("int32", (128, 48)),
        "weight_scale": ("bfloat16", (128, 1)),
        "weight_shape": ("int64", (2,)),
    },
    "W4A16 per group": {
        "weight_packed": ("int32", (128, 24)),
        "weight_scale": ("bfloat16", (128, 3)),
        "weight_shape": ("int64", (2,)),
    },
    "W4A16 per group asymmetric": {
        "weight_packed": ("int32", (128, 24)),
        "weight_scale": ("bfloat16", (128, 3)),
        "weight_shape": ("int64", (2,)),
        "weight_zero_point": ("int32", (16, 3)),
    },
    "W8A8 static": {
        "weight": ("int8", (128, 192)),
        "weight_scale": ("bfloat16", (128, 1)),
        "input_scale": ("bfloat16", (1,)),
    },
    "W8A8 static asymmetric": {
        "weight": ("int8", (128, 192)),
        "weight_scale": ("bfloat16", (128, 1)),
        "input_scale": ("bfloat16", (1,)),
        "input_zero_point": ("int8", (1,)),
    },
    "W8A8 dynamic": {"weight": ("int8", (128, 192)), "weight_scale": ("bfloat16", (128, 1))},
}


@pytest.mark.parametrize("scheme", TENSORS)
def test_tensors_of_a_linear(scheme: str, tmp_path: Path) -> None:
    """Names, dtypes and shapes are those that the schemes' loaders register."""
    source = tiny_checkpoint(tmp_path / "m", dtype="bfloat16", hidden_size=128, intermediate_size=192)
    reader = CheckpointReader(source)
    layer = quantize(reader, 0, {"mlp.down_proj": QuantPolicy(**SCHEMES[scheme])})
    tensors = FORMAT.encode_layer(layer, reader.architecture)
    prefix = PREFIX + "mlp.down_proj."
    found = {n.removeprefix(prefix): (a.dtype.name, a.shape) for n, a in tensors.items() if n.startswith(prefix)}
    assert found == TENSORS[scheme]
    assert PREFIX + "mlp.up_proj.weight" in tensors
    if "weight_shape" in found:
        assert tensors[prefix + "weight_shape"].tolist() == [128, 192]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_expected_tensors_are_what_is_encoded(scheme: str, model_type: str, tmp_path: Path) -> None:
    """The merge's expectation and the encoder agree for every scheme, biases included."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", model_type, "float16", hidden_size=128))
    policy = QuantPolicy(**SCHEMES[scheme])
    layer = quantize(reader, 1, dict.fromkeys(LINEARS[:5], policy))
    encoded = FORMAT.encode_layer(layer, reader.architecture)
    policies = {f"model.layers.1.{name}": policy for name in LINEARS[:5]}
    expected = FORMAT.expected_tensors(1, policies, None, reader.architecture)
    assert {n: s.shape for n, s in expected.items()} == {n: a.shape for n, a in encoded.items()}
    assert all(encoded[name].dtype.name == (stored.dtype or "float16") for name, stored in expected.items())


def publish(source: Path, output: Path, layers: list[QuantizedLayer]) -> Path:
    reader = CheckpointReader(source)
    output.mkdir()
    prints = Fingerprints(recipe="r", source="s", data="d")
    manifests = [publish_layer(output, layer, reader.architecture, [FORMAT.name], prints) for layer in layers]
    outer = publish_outer(output, reader, [FORMAT.name], prints)
    merge_checkpoint(output, FORMAT.name, reader, manifests, outer)
    return output / FORMAT.name


def same(left: QuantizedLayer, right: QuantizedLayer) -> None:
    assert left.layer == right.layer
    assert left.tensors.keys() == right.tensors.keys()
    assert left.linears.keys() == right.linears.keys()
    for name, array in left.tensors.items():
        assert array.tobytes() == right.tensors[name].tobytes()
    for name, linear in left.linears.items():
        other = right.linears[name]
        np.testing.assert_array_equal(linear.dequantized(), other.dequantized())
        for field in ("codes", "scale", "zero_point", "group_index", "bias", "input_scale"):
            np.testing.assert_array_equal(getattr(linear, field), getattr(other, field), err_msg=field)
        assert (linear.input_zero_point or 0) == (other.input_zero_point or 0)
        keys = {"weight_quant_dtype", "act_quant_dtype", "group_size", "weight_symmetric", "act_symmetric"}
        keys |= {"weight_quant_granularity", "act_quant_granularity"}
        assert linear.policy.model_dump(include=keys) == other.policy.model_dump(include=keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_published_reads_back(scheme: str, dtype: str, tmp_path: Path) -> None:
    """Decoding a published directory gives the solvers' integers, scales, biases and float tensors, bit for bit."""
    source = tiny_checkpoint(tmp_path / "m", "qwen2", dtype, hidden_size=128)
    reader = CheckpointReader(source)
    layers = [quantize(reader, layer, dict.fromkeys(LINEARS, QuantPolicy(**SCHEMES[scheme]))) for layer in range(2)]
    published = CheckpointReader(publish(source, tmp_path / "run", layers), quantized=True)
    for layer in layers:
        same(layer, FORMAT.decode_layer(published, layer.layer))


def test_mixed_policies_read_back(tmp_path: Path) -> None:
    """Several schemes and float linears in one model come back as they were."""
    source = tiny_checkpoint(tmp_path / "m", hidden_size=128)
    reader = CheckpointReader(source)
    static, packed = QuantPolicy(**SCHEMES["W8A8 static"]), QuantPolicy(**SCHEMES["W4A16 per group"])
    layers = [
        quantize(reader, 0, {**dict.fromkeys(LINEARS, static), "mlp.down_proj": None}),
        quantize(reader, 1, {**dict.fromkeys(LINEARS, None), "mlp.down_proj": packed, "mlp.up_proj": static}),
    ]
    directory = publish(source, tmp_path / "run", layers)
    published = CheckpointReader(directory, quantized=True)
    for layer in layers:
        same(layer, FORMAT.decode_layer(published, layer.layer))
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"


def test_a_group_index_is_stored_and_read_back(tmp_path: Path) -> None:
    """Columns taken in another order without static groups carry the group of each column."""
    source = tiny_checkpoint(tmp_path / "m", hidden_size=128)
    reader = CheckpointReader(source)
    args = AlgoArgs(desc_act=True)
    policy = QuantPolicy(**{**SCHEMES["W4A16 per group"], "precision_recovery": "gptq", "algo_args": args})
    layers = [quantize(reader, layer, {"mlp.up_proj": policy}) for layer in range(2)]
    order = np.random.default_rng(0).permutation(128)
    index = (np.argsort(order) // 64).astype(np.int32)
    for layer in layers:
        linear = dataclasses.replace(layer.linears["mlp.up_proj"], group_index=index)
        layer.linears["mlp.up_proj"] = linear  # type: ignore[index]  # a dict here
    directory = publish(source, tmp_path / "run", layers)
    read = FORMAT.decode_layer(CheckpointReader(directory, quantized=True), 1)
    same(layers[1], read)
    np.testing.assert_array_equal(read.linears["mlp.up_proj"].group_index, index)
    notes = FORMAT.check_policies({"model.layers.0.mlp.up_proj": policy}, reader.architecture)
    assert any("from 0.19 on" in note and "set algo_args static_groups: true" in note for note in notes)


def test_a_uniform_config_is_the_published_one() -> None:
    """One scheme for all linears is written as its specification shows it, by module class."""
    policies = uniform(QuantPolicy(act_quant_dtype="int8"))
    config = FORMAT.config({"hidden_size": 128}, policies, {0: None, 1: None}, architecture())
    assert config == {
        "hidden_size": 128,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel",
                        "dynamic": False,
                    },
                    "input_activations": {
                        "num_bits": 8,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "tensor",
                        "dynamic": False,
                    },
                    "output_activations": None,
                    "format": "int-quantized",
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        },
    }


def test_mixed_targets_are_patterns_or_names() -> None:
    """A linear treated alike in all layers is a pattern, one treated apart its full name, float ones are ignored."""
    policies = uniform(QuantPolicy())
    policies |= {"model.layers.1.mlp.down_proj": QuantPolicy(**SCHEMES["W4A16 per group"])}
    policies |= {f"model.layers.{layer}.self_attn.o_proj": None for layer in range(2)}
    quantization = FORMAT.config({}, policies, {}, architecture())["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head", r"re:.*\.self_attn\.o_proj$"]
    groups = quantization["config_groups"]
    assert groups["group_1"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert groups["group_1"]["weights"]["group_size"] == 64
    assert r"re:.*\.mlp\.up_proj$" in groups["group_0"]["targets"]
    assert "model.layers.0.mlp.down_proj" in groups["group_0"]["targets"]


def test_the_head_is_carried_over_whatever_its_policy() -> None:
    """lm_head stays in float and is listed as ignored."""
    policies = {**uniform(QuantPolicy()), "lm_head": QuantPolicy()}
    assert FORMAT.config({}, policies, {}, architecture())["quantization_config"]["ignore"] == ["lm_head"]


def test_key_value_scales_are_one_a_tensor(tmp_path: Path) -> None:
    """The largest channel's scale is stored for keys and for values, and comes back for every channel."""
    source = tiny_checkpoint(tmp_path / "m")
    reader = CheckpointReader(source)
    scales = np.linspace(0.25, 1.0, reader.architecture.kv_size, dtype=np.float32)
    cache = QuantizedKVCache(key_scale=scales, value_scale=scales * 2)
    layers = [QuantizedLayer(layer=n, linears={}, tensors=reader.read_layer(n), kv_cache=cache) for n in range(2)]
    directory = publish(source, tmp_path / "run", layers)
    read = FORMAT.decode_layer(CheckpointReader(directory, quantized=True), 1)
    assert read.kv_cache is not None
    np.testing.assert_array_equal(read.kv_cache.key_scale, np.full(scales.shape, 1.0))
    np.testing.assert_array_equal(read.kv_cache.value_scale, np.full(scales.shape, 2.0))
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "tensor"


REFUSED: list[tuple[str, dict[str, QuantPolicy | None], str]] = [
    (
        "group size",
        uniform(QuantPolicy(weight_quant_granularity="per_group", group_size=256)),
        r"^model\.layers\.0\.self_attn\.q_proj: 128 input channels do not divide into groups of 256",
    ),
    (
        "cache per token",
        uniform(QuantPolicy(kvcache_quant_dtype="int8", kvcache_quant_granularity="per_token")),
        "kvcache_quant_granularity: per_channel",
    ),
    (
        "cache of one layer",
        {**uniform(QuantPolicy()), **uniform(QuantPolicy(kvcache_quant_dtype="int8"), num_layers=1)},
        "of all layers or of none",
    ),
]


@pytest.mark.parametrize(("policies", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_expressed_is_refused(policies: dict[str, QuantPolicy | None], message: str) -> None:
    """Before any work, by linear and with the setting to change."""
    with pytest.raises(UserError, match=message):
        FORMAT.check_policies(policies, architecture())


ZERO_POINTS = {"weight_symmetric": False}
W4_GROUPS = SCHEMES["W4A16 per group"]
WIDE = {"hidden_size": 1024, "intermediate_size": 2048}  # four cards hold whole tiles of it
NOTED: list[tuple[str, dict[str, Any], str]] = [
    ("packed zero points", {**W4_GROUPS, **ZERO_POINTS}, "CompressedTensorsConfig(dequantize=True)"),
    ("int8 zero points", ZERO_POINTS, "on Hopper cards only: set weight_symmetric: true"),
    (
        "W8A8 with zero points",
        {**SCHEMES["W8A8 dynamic"], **ZERO_POINTS},
        "take symmetric weights there: set weight_sym",
    ),
    ("W4A8", SCHEMES["W4A8 dynamic"], "on CPUs and Intel XPUs alone: set act_quant_dtype: null"),
    ("static activations", SCHEMES["W8A8 static"], "for Ascend cards set format: [ascend], or act_quant_granularity"),
    ("cache", {"kvcache_quant_dtype": "int8"}, "vLLM refuses to load them"),
]


@pytest.mark.parametrize(("fields", "text"), [r[1:] for r in NOTED], ids=[r[0] for r in NOTED])
def test_notes_tell_what_engines_do_not_load(fields: dict[str, Any], text: str) -> None:
    """A scheme that not every engine runs as it is meant is said before any work, once, with what to set."""
    notes = FORMAT.check_policies(uniform(QuantPolicy(**fields)), architecture(**WIDE))
    (note,) = [note for note in notes if text in note]
    assert note.startswith(
        "kvcache_quant_dtype" if "kvcache" in text or "refuses to load them" in text else "model.layers.0.self_attn.q"
    )


@pytest.mark.parametrize("scheme", ["W8A16", "W8A8 dynamic", "W4A16 per channel", "W4A16 ordered by activation"])
def test_a_recipe_that_all_engines_run_needs_no_note(scheme: str) -> None:
    """Weights alone in vLLM and transformers, and int8 per token everywhere, say nothing."""
    assert FORMAT.check_policies(uniform(QuantPolicy(**SCHEMES[scheme])), architecture(**WIDE)) == ()


def test_groups_tell_over_how_many_cards_vllm_splits_them() -> None:
    """Four heads would let four cards share the model; 128 channels of o_proj in groups of 64 do not."""
    (note,) = FORMAT.check_policies(uniform(QuantPolicy(**W4_GROUPS)), architecture())
    assert "up to tensor_parallel_size 2, then" in note


def test_linears_that_an_engine_fuses_and_that_differ_are_noted() -> None:
    """Of different schemes, or of one scheme with input scales of their own, which transformers alone runs."""
    static = QuantPolicy(**SCHEMES["W8A8 static"])
    mixed = {**uniform(QuantPolicy()), "model.layers.1.self_attn.q_proj": None}
    (note,) = FORMAT.check_policies(mixed, architecture(**WIDE))
    assert "model.layers.1.self_attn.q_proj and its neighbours k_proj, v_proj have different schemes" in note
    ranges = {**uniform(static), "model.layers.0.mlp.up_proj": static.model_copy(update={"act_range": "minmax"})}
    noted = [
        note for note in FORMAT.check_policies(ranges, architecture(**WIDE)) if "input scales of their own" in note
    ]
    assert len(noted) == 1
    assert noted[0].startswith("model.layers.0.mlp.gate_proj and its neighbours up_proj")
    dynamic = {
        name: policy.model_copy(update={"act_quant_granularity": "per_token"})
        for name, policy in ranges.items()
        if policy
    }
    assert FORMAT.check_policies(dynamic, architecture(**WIDE)) == ()


def test_scales_per_token_are_symmetric_whatever_the_policy_says() -> None:
    """Engines would take a zero point a token, with which neither solvers nor evaluation reckon."""
    fields = SCHEMES["W8A8 dynamic"]
    asked = {
        **uniform(QuantPolicy(**fields)),
        "model.layers.1.mlp.down_proj": QuantPolicy(**fields, act_symmetric=False),
    }
    quantization = FORMAT.config({}, asked, {}, architecture())["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert group["input_activations"]["symmetric"] is True
    static = uniform(QuantPolicy(**SCHEMES["W8A8 static asymmetric"]))
    (group,) = FORMAT.config({}, static, {}, architecture())["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["symmetric"] is False


@pytest.mark.parametrize("name", DIALECTS)
def test_a_cache_with_a_scale_a_token_is_refused_alike_by_every_format(name: str) -> None:
    """Nothing of it could be published, so that no other format is advised."""
    policies = uniform(QuantPolicy(kvcache_quant_dtype="int8", kvcache_quant_granularity="per_token"))
    with pytest.raises(UserError, match=r"^model\.layers\.0\.self_attn: .* exists in gs_dist\.ptq alone") as caught:
        codec_of(name).check_policies(policies, architecture())
    assert "kvcache_quant_granularity: per_channel" in str(caught.value)
    assert "format" not in str(caught.value)


def test_a_result_that_cannot_be_held_is_refused(tmp_path: Path) -> None:
    """Scales that the model's dtype would round, and biases without a place, are never written."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", dtype="bfloat16"))
    layer = quantize(reader, 0, {"mlp.up_proj": QuantPolicy()})
    linear = layer.linears["mlp.up_proj"]
    unrounded = dataclasses.replace(linear, scale=linear.scale + np.float32(1e-5))
    biased = dataclasses.replace(linear, bias=np.ones(128, np.float32))
    ordered = dataclasses.replace(linear, group_index=np.zeros(64, np.int32))
    static = dataclasses.replace(linear, policy=QuantPolicy(act_quant_dtype="int8"))
    smoothed = dataclasses.replace(linear, smooth_scale=np.ones(64, np.float32))
    for wrong, message in [
        (unrounded, "not rounded to bfloat16"),
        (biased, "no place for it"),
        (ordered, "group index"),
        (static, "no input scale"),
        (smoothed, "rescaled input"),
    ]:
        with pytest.raises(ValueError, match=message):
            FORMAT.encode_layer(dataclasses.replace(layer, linears={"mlp.up_proj": wrong}), reader.architecture)


DAMAGE: list[tuple[str, dict[str, npt.NDArray[Any] | None], str]] = [
    ("scale missing", {"mlp.up_proj.weight_scale": None}, "up_proj.weight_scale: .* found nothing"),
    ("scale misshapen", {"mlp.up_proj.weight_scale": np.ones((1, 64), np.float32)}, r"up_proj.weight_scale"),
    ("weight in float", {"mlp.up_proj.weight": np.ones((128, 64), np.float32)}, "up_proj.weight: int8"),
    ("norm missing", {"input_layernorm.weight": None}, "input_layernorm.weight: shape"),
    ("float linear misshapen", {"mlp.down_proj.weight": np.ones((2, 2), np.float32)}, "down_proj.weight: shape"),
]


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in DAMAGE], ids=[r[0] for r in DAMAGE])
def test_a_damaged_layer_is_refused(change: dict[str, npt.NDArray[Any] | None], message: str, tmp_path: Path) -> None:
    """Decoding names the tensor that config.json calls for and that is missing or has another form."""
    source = tiny_checkpoint(tmp_path / "m")
    reader = CheckpointReader(source)
    policies: dict[str, QuantPolicy | None] = {"mlp.up_proj": QuantPolicy(**SCHEMES["W8A8 static"])}
    directory = publish(source, tmp_path / "run", [quantize(reader, layer, policies) for layer in range(2)])
    published = CheckpointReader(directory, quantized=True)
    tensors: dict[str, Any] = {name: np.array(a) for name, a in published.read(published.tensors).items()}
    for name, array in change.items():
        tensors.pop(PREFIX + name)
        if array is not None:
            tensors[PREFIX + name] = array
    write_safetensors(directory / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        FORMAT.decode_layer(CheckpointReader(directory, quantized=True), 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3}, "served are int"),
        ({"type": "float"}, "served are int"),
        ({"strategy": "block"}, "served are int"),
        ({"strategy": "group", "group_size": 32}, "is not served: .*32"),
        ({"strategy": "group", "group_size": None}, "is not served"),
        ({"symmetric": "yes"}, "is not served"),
    ],
)
def test_schemes_of_others_are_refused(weights: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A checkpoint of a scheme that is not served is refused by its linear."""
    source = tiny_checkpoint(tmp_path / "m")
    reader = CheckpointReader(source)
    layers = [quantize(reader, layer, dict.fromkeys(LINEARS, QuantPolicy())) for layer in range(2)]
    directory = publish(source, tmp_path / "run", layers)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        FORMAT.decode_layer(CheckpointReader(directory, quantized=True), 0)


def test_scales_are_stored_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    """float16 models have float16 scales and biases."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", "qwen2", "float16"))
    tensors = FORMAT.encode_layer(quantize(reader, 0, {"self_attn.q_proj": QuantPolicy()}), reader.architecture)
    assert tensors[PREFIX + "self_attn.q_proj.weight_scale"].dtype == DTYPES["float16"]
    assert tensors[PREFIX + "self_attn.q_proj.bias"].dtype == DTYPES["float16"]


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        [],
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": []}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [3]}}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["re:("]}}},
    ],
)
def test_a_damaged_description_is_refused(quantization: Any, tmp_path: Path) -> None:
    """Whatever stands under quantization_config, decoding ends in a CheckpointError."""
    source = tiny_checkpoint(tmp_path / "m")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*quantiz|config\.json: the scheme"):
        FORMAT.decode_layer(CheckpointReader(source, quantized=True), 0)
