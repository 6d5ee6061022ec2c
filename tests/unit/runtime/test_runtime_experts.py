"""Families from a checkpoint to what is published: fused linears, routers that follow, experts that starve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import random_tensors, save_checkpoint, tiny_checkpoint, tiny_config
from runs import SEQUENCE_LENGTH, plan_of, published_hashes, run_inline, save_samples, small_recipe
from safetensors import safe_open

from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import RecipeError, UserError
from gs_dist.results.coverage import describe_coverage, expert_coverage
from gs_dist.results.summary import read_summary

Array = npt.NDArray[Any]

NO_HEAD = {"opname_blacklist": ["lm_head"]}
DYNAMIC = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "act_quant_granularity": "per_token", **NO_HEAD}
SMOOTH = {**DYNAMIC, "outliers_suppression": "smooth"}
GPTQ = {"weight_quant_dtype": "qint4x2", "precision_recovery": "gptq", **NO_HEAD}
WEIGHTS = {"weight_quant_dtype": "int8", "outliers_suppression": "awq", **NO_HEAD}


def prepared(directory: Path, family: str, **keys: Any) -> Path:
    tiny_checkpoint(directory / "model", family, **keys)
    save_samples(directory / "samples.parquet", 128)
    return directory


def logits(directory: Path, dialect: str | None = None) -> Array:
    """Of 2 x 20 tokens; by the integers and roundings of a published directory where a dialect is given."""
    reader = CheckpointReader(directory, quantized=dialect is not None)
    network = DecoderNetwork(reader.architecture, open_device("cpu", threads=1))
    outer = network.outer_weights(reader.read_outer())
    hidden = network.embed(outer, np.random.default_rng(1).integers(0, 128, (2, 20)).astype(np.int32))
    for layer in range(reader.architecture.num_layers):
        if dialect is None:
            weights = network.layer_weights(layer, reader.read_layer(layer))
        else:
            weights = network.layer_weights(layer, {}, quantized=codec_of(dialect).decode_layer(reader, layer))
        hidden, _ = network.forward_layer(weights, hidden, capture=False)
    return np.asarray(network.logits(outer, hidden).asnumpy())


def stored(directory: Path) -> dict[str, Array]:
    """Every tensor of a published directory by safetensors' own reader."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (not a mapping)
    return tensors


def as_float_model(published: Path, target: Path) -> Path:
    """The float checkpoint that the integers of a published directory stand for, by NumPy alone."""
    config = json.loads((published / "config.json").read_text())
    config.pop("quantization_config", None)
    tensors = stored(published)
    plain = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_offset", "weight_shape"):
            continue
        if leaf == "weight_packed":
            scale = tensors[f"{owner}.weight_scale"].astype(np.float64)
            halves = (tensor.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
            grouped = (halves.astype(np.float64) - 8).reshape(len(tensor), scale.shape[1], -1) * scale[:, :, None]
            plain[f"{owner}.weight"] = grouped.reshape(len(tensor), -1).astype(np.float32)
            continue
        plain[name] = tensor
        if leaf == "weight" and f"{owner}.weight_scale" in tensors:
            plain[name] = (tensor.astype(np.float64) * tensors[f"{owner}.weight_scale"]).astype(np.float32)
    return save_checkpoint(target, config, plain)


def far_off(found: Array, expected: Array) -> Array:
    """Largest difference of each token's logits, (tokens,), the worst last.

    A token whose choice of experts is nearly a tie may go elsewhere after rounding, and is far off then.
    """
    return np.sort(np.abs(found - expected).max(axis=-1).reshape(-1))


@pytest.mark.parametrize(
    ("family", "dialect"),
    [
        ("granite", "compressed-tensors"),
        ("granite", "ascend"),
        ("phi3", "compressed-tensors"),
        ("phi3", "ascend"),
        ("mixtral", "compressed-tensors"),
        ("mixtral", "ascend"),
        ("qwen2_moe", "compressed-tensors"),
        ("qwen2_moe", "ascend"),
        ("glm4_moe", "compressed-tensors"),
        ("glm4_moe", "ascend"),
        ("qwen3_moe", "compressed-tensors"),
        ("qwen3_moe", "ascend"),
        ("deepseek_v2", "compressed-tensors"),
        ("deepseek_v2", "ascend"),
        ("deepseek_v3", "compressed-tensors"),
        ("deepseek_v3", "ascend"),
    ],
)
def test_what_is_published_computes_what_the_model_did(family: str, dialect: str, tmp_path: Path) -> None:
    """Decoded by NumPy alone, the integers make nearly the source's logits: routers followed what norms took up."""
    config = small_recipe(prepared(tmp_path, family), ptq=SMOOTH, format=[dialect])
    run_inline(config)
    published = tmp_path / "out" / dialect
    assert not check(published).problems
    source, decoded = logits(tmp_path / "model"), logits(as_float_model(published, tmp_path / "decoded"))
    assert far_off(decoded, source)[-4] < 0.15
    # The same integers with inputs rounded to int8, as an engine runs them.
    assert far_off(logits(published, dialect), source)[-4] < 0.3
    assert (
        family not in ("glm4_moe", "deepseek_v3")
        or stored(published)["model.layers.1.mlp.gate.e_score_correction_bias"].any()
    )
    router = [name for name in stored(published) if name.endswith(("mlp.gate.weight", "moe.gate.weight"))]
    assert router or family in ("granite", "phi3")
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        assert all((stored(published)[name] != file.get_tensor(name)).any() for name in router)


INT4 = {
    "weight_quant_dtype": "qint4x2",
    "act_quant_dtype": "int8",
    "act_quant_granularity": "per_token",
    "precision_recovery": "gptq",
    "algo_args": {"desc_act": True, "static_groups": True},
}
STATIC = {"act_quant_granularity": "per_tensor"}


@pytest.mark.parametrize(
    ("family", "schemes", "labels"),
    [
        (
            "deepseek_v3",
            {r".*mlp\.experts\..*": INT4, r".*self_attn\..*": STATIC},
            {"self_attn.o_proj": "W8A8", "self_attn.kv_b_proj": "FLOAT", "mlp.shared_experts.up_proj": "W8A8_DYNAMIC"},
        ),
        ("qwen3_moe", {r".*mlp\.experts\..*": INT4}, {"self_attn.q_proj": "W8A8_DYNAMIC"}),
        ("qwen3_moe", {r".*self_attn\..*": STATIC}, {"self_attn.q_proj": "W8A8"}),
    ],
    ids=["W4A8 experts, static attention, latent", "W4A8 experts", "static attention"],
)
def test_schemes_may_differ_between_experts_and_attention(
    family: str, schemes: dict[str, Any], labels: dict[str, str], tmp_path: Path
) -> None:
    """Labels say which is which, the check finds no fault, and each kind turned back is near the source."""
    prepared(tmp_path, family, hidden_size=64)
    int4 = INT4 in schemes.values()
    config = small_recipe(tmp_path, ptq=DYNAMIC, format=["ascend"], layer_policies=schemes)
    run_inline(config)
    published = tmp_path / "out" / "ascend"
    assert not check(published).problems
    description = json.loads((published / "quant_model_description.json").read_text())
    expert = "model.layers.1.mlp.experts.3.down_proj"
    wanted = {**labels, "mlp.gate": "FLOAT", "mlp.experts.3.down_proj": "W4A8_DYNAMIC" if int4 else "W8A8_DYNAMIC"}
    assert {name: description[f"model.layers.1.{name}.weight"] for name in wanted} == wanted
    assert description["group_size"] == 0
    if int4:
        tensors = stored(published)
        octets = tensors[f"{expert}.weight"].astype(np.int64)
        codes = np.empty((64, 48), np.int64)
        for row, half in enumerate((octets & 15, octets >> 4 & 15)):
            codes[row::2] = np.where(half > 7, half - 16, half)
        scale = tensors[f"{expert}.weight_scale"]
        shares = codes.reshape(64, 16, 3).sum(axis=2)
        np.testing.assert_allclose(tensors[f"{expert}.scale_bias"], 8.0 * shares * scale, rtol=1e-6)
        with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
            source = file.get_tensor(f"{expert}.weight")
        assert np.square(codes * scale - source).sum() < 0.03 * np.square(source).sum()
    assert far_off(logits(published, "ascend"), logits(tmp_path / "model"))[-8] < (2.0 if int4 else 0.3)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_int4_experts_stand_beside_int8_attention(family: str, tmp_path: Path) -> None:
    """W4A16 in groups for experts and W8A8 for attention, decoded by NumPy alone: near the source, and as evaluated."""
    grouped = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
    weights = {**grouped, "act_quant_dtype": None, "act_quant_granularity": "per_tensor", "precision_recovery": "gptq"}
    policies = {r".*mlp\.experts\..*": weights}
    config = small_recipe(prepared(tmp_path, family, moe_intermediate_size=64), ptq=DYNAMIC, layer_policies=policies)
    run_inline(config)
    published = tmp_path / "out" / "compressed-tensors"
    assert not check(published).problems
    source, decoded = logits(tmp_path / "model"), logits(as_float_model(published, tmp_path / "decoded"))
    evaluated = logits(published, "compressed-tensors")
    assert far_off(decoded, source)[-8] < 1.5
    assert far_off(evaluated, decoded)[-8] < 0.3  # activations of attention rounded, too


def test_experts_are_the_same_bytes_at_any_layout(tmp_path: Path) -> None:
    """Stages and replicas change no byte, though each replica deals its own tokens to experts."""
    prepared(tmp_path, "qwen3_moe", dtype="float16", mlp_only_layers=[0])
    alone = small_recipe(tmp_path, "alone", ptq=SMOOTH)
    shared = small_recipe(
        tmp_path,
        "shared",
        ptq=SMOOTH,
        parallel={"pipeline_parallel_size": 2, "data_parallel_size": 2},
    )
    for config in (alone, shared):
        run_inline(config)
    assert published_hashes(alone) == published_hashes(shared)


def starving(directory: Path) -> Path:
    """A model whose router gives every token to one of two experts, and to the first of the six others."""
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    for layer in range(2):
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        router[1] = -router[0]
        router[2:] = 0.0
    save_samples(directory / "samples.parquet", 128)
    save_checkpoint(directory / "model", config, tensors)
    return directory


def test_latent_attention_is_the_same_bytes_at_any_layout(tmp_path: Path) -> None:
    """Two dense first layers and two of experts lie on three stages of two replicas, or on one worker."""
    prepared(tmp_path, "deepseek_v3", dtype="float16", num_layers=4, first_k_dense_replace=2)
    alone = small_recipe(tmp_path, "alone", ptq=SMOOTH)
    spread = {"pipeline_parallel_size": 3, "data_parallel_size": 2}
    shared = small_recipe(tmp_path, "shared", ptq=SMOOTH, parallel=spread)
    for config in (alone, shared):
        run_inline(config)
    assert published_hashes(alone) == published_hashes(shared)
    kept = stored(tmp_path / "alone" / "compressed-tensors")["model.layers.3.self_attn.kv_b_proj.weight"]
    assert kept.dtype == np.float16
    notes = " ".join(plan_of(alone).notes)
    assert "4 linears kv_b_proj (taken apart by engines, which absorb it into attention) stay in float" in notes


@pytest.mark.parametrize("family", ["deepseek_v2", "phi3"])
def test_a_cache_of_latents_is_not_quantized(family: str, tmp_path: Path) -> None:
    """Its scales would be of keys and values, which are not what is cached; nor have fused ones scales of their own."""
    config = small_recipe(prepared(tmp_path, family), ptq={**DYNAMIC, "kvcache_quant_dtype": "int8"})
    with pytest.raises(UserError, match="kvcache_quant_dtype: null"):
        plan_of(config)


@pytest.mark.parametrize("ptq", [SMOOTH, GPTQ], ids=["smooth", "gptq"])
def test_experts_that_no_token_reaches_are_quantized_and_named(ptq: dict[str, Any], tmp_path: Path) -> None:
    """They take the tokens that came closest, the summary says so, and no scale is 0, infinite or NaN."""
    config = small_recipe(starving(tmp_path), ptq=ptq)
    summary = run_inline(config)
    rows = {row.name: row for row in summary.rows}
    downs = [rows[f"model.layers.0.mlp.experts.{expert}.down_proj"] for expert in range(8)]
    starved = [row for row in downs if any(note.startswith("0 tokens reached this expert") for note in row.notes)]
    assert 0 < len(starved) < 7
    assert all(row.num_tokens > 0 for row in downs)
    assert not any("reached" in note for note in downs[0].notes)
    coverage = expert_coverage(summary.rows)
    # Each of a block's tokens goes to two experts.
    assert [sum(layer.given) for layer in coverage] == [2 * 20 * SEQUENCE_LENGTH] * 2
    assert coverage[0].unreached == len(starved)
    assert f"{sum(layer.unreached for layer in coverage)} reached by none" in describe_coverage(coverage)
    assert read_summary(tmp_path / "out").rows == summary.rows
    for name, tensor in stored(tmp_path / "out" / "compressed-tensors").items():
        assert np.isfinite(tensor.astype(np.float64)).all(), name
        assert not name.endswith("scale") or (tensor > 0).all(), name


def test_a_dense_model_cut_into_experts_is_the_same_function(tmp_path: Path) -> None:
    """Slices of an mlp, all chosen with equal weight, compute what the mlp did."""
    dense = tiny_config("mistral")
    tensors = random_tensors(dense)
    num_experts = 4
    cut = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        cut[f"{prefix}block_sparse_moe.gate.weight"] = np.zeros((num_experts, 64), np.float32)
        for expert in range(num_experts):
            rows = slice(expert * 128 // num_experts, (expert + 1) * 128 // num_experts)
            own = f"{prefix}block_sparse_moe.experts.{expert}."
            cut[f"{own}w1.weight"] = tensors[f"{prefix}mlp.gate_proj.weight"][rows].copy()
            cut[f"{own}w3.weight"] = tensors[f"{prefix}mlp.up_proj.weight"][rows].copy()
            cut[f"{own}w2.weight"] = num_experts * tensors[f"{prefix}mlp.down_proj.weight"][:, rows]
    keys = {"num_local_experts": num_experts, "num_experts_per_tok": num_experts}
    save_checkpoint(tmp_path / "dense", dense, tensors)
    save_checkpoint(tmp_path / "cut", tiny_config("mixtral", intermediate_size=32, **keys), cut)
    np.testing.assert_allclose(logits(tmp_path / "cut"), logits(tmp_path / "dense"), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": ["golden-stick"]}, "golden-stick has no reader that knows experts"),
        ({"format": ["ascend"], "ptq": WEIGHTS}, "int8 and int4 experts with activations per token only"),
        ({"layer_policies": {r".*experts\.3\.down_proj": None}}, "run all experts of a layer as one"),
        ({"bits": "auto", "size_budget": 0.3, "ptq": {"weight_quant_dtype": "int8", **NO_HEAD}}, "bits: fixed"),
    ],
)
def test_what_no_engine_runs_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before any work, with what to write instead."""
    config = small_recipe(prepared(tmp_path, "qwen3_moe"), **{"ptq": DYNAMIC, **changes})

    def refuse() -> None:
        plan = plan_of(config)
        for name in config.dialects:
            codec_of(name).check_policies(plan.policies, plan.architecture)

    with pytest.raises((RecipeError, UserError), match=message):
        refuse()


def test_a_bad_expert_keeps_all_of_its_layer_in_float(tmp_path: Path) -> None:
    """Engines run the experts of a layer as one, so that none is left alone."""
    config = small_recipe(
        prepared(tmp_path, "qwen3_moe"), ptq=SMOOTH, max_relative_error=1e-9, on_bad_layer="keep_float"
    )
    rows = run_inline(config).rows
    assert {row.strategy for row in rows if ".experts." in row.name} == {"NA"}


def test_weights_alone(tmp_path: Path) -> None:
    """W8A16 with AWQ, whose scale all experts and their router share, leaves the logits nearly as they were."""
    config = small_recipe(prepared(tmp_path, "qwen3_moe"), ptq=WEIGHTS)
    run_inline(config)
    published = tmp_path / "out" / "compressed-tensors"
    assert far_off(logits(published, "compressed-tensors"), logits(tmp_path / "model"))[-4] < 0.15
