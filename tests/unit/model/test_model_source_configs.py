"""Config files of real models: read as transformers reads them, or refused for a reason that holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gs_dist.checkpoint.source_views import decodes
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, MixtureOfExperts
from gs_dist.model.families import FAMILIES, read_architecture
from gs_dist.model.rotary import Llama3Scaling, YarnScaling

TABLE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "source_configs.json").read_text(encoding="utf-8")
)


def found(architecture: DecoderArchitecture) -> dict[str, Any]:
    """What was read, in the words of `tests/data/make_source_configs.py`."""
    attention, mlps = architecture.layers[0].attention, [layer.mlp for layer in architecture.layers]
    scaling = attention.rotary.scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rotary.theta}
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            rope[key] = getattr(scaling, key)
    eos = list(architecture.eos_token_ids)
    dense = [mlp for mlp in mlps if isinstance(mlp, GatedMlp)]
    frequencies = attention.rotary.frequencies().tolist()
    return {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_layers": architecture.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "rms_norm_eps": architecture.rms_norm_eps,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "max_position_embeddings": architecture.max_position_embeddings,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "dtype": architecture.dtype,
        "rope": rope,
        "multipliers": [
            architecture.embedding_multiplier,
            architecture.layers[0].residual_multiplier,
            architecture.logits_divisor,
        ],
        "growth": attention.rotary.growth,
        "windows": sorted({str(layer.attention.window) for layer in architecture.layers}),
        "frequencies": [frequencies[0], frequencies[len(frequencies) // 2], frequencies[-1]],
        "channels_turning": attention.rotary.channels,
        "rotary_factor": scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0,
        "score_scale": attention.score_scale,
        "attention": {
            linear.name.removeprefix("self_attn."): [linear.out_features, linear.in_features, linear.bias]
            for linear in attention.linears
        },
        "norms": sorted(name.split(".")[1] for name in attention.norms),
        "intermediate_size": dense[0].intermediate_size if dense else None,
        "mlp_bias": bool(dense) and dense[0].bias,
        "dense_layers": [layer for layer, mlp in enumerate(mlps) if mlp in dense] if dense != mlps else [],
        "experts": next((experts(mlp) for mlp in mlps if isinstance(mlp, MixtureOfExperts)), None),
    }


def experts(mlp: MixtureOfExperts) -> dict[str, Any]:
    """The same of a mixture."""
    return {
        "num_experts": mlp.num_experts,
        "intermediate_size": mlp.intermediate_size,
        "shared_size": mlp.shared_size,
        "top_k": mlp.routing.top_k,
        "scale": mlp.routing.scale,
        "normalised": mlp.routing.normalized,
        "groups": [mlp.routing.num_groups, mlp.routing.top_groups],
    }


def read(config: dict[str, Any]) -> DecoderArchitecture:
    """As `CheckpointReader` does, which decodes FP8 with a scale a block."""
    return read_architecture(
        {key: value for key, value in config.items() if key != "quantization_config" or not decodes(config)}
    )


@pytest.mark.parametrize("name", TABLE)
def test_a_real_config_is_read_as_transformers_reads_it_or_refused(name: str) -> None:
    """The class in transformers says what each key means; a refusal names the key for which there is one."""
    entry = TABLE[name]
    refusal = ""
    try:
        architecture = read(entry["config"])
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert entry.get("refused", "nothing: it is to be read") in refusal
    else:
        assert "refused" not in entry
        expected = {**entry["reading"], "dtype": entry["reading"]["dtype"] or "float32"}
        actual = found(architecture)
        for key in ("frequencies", "rotary_factor", "score_scale"):  # theirs are of float32
            assert actual.pop(key) == pytest.approx(expected.pop(key), rel=2e-6), key
        assert actual == expected


def test_the_table_is_of_all_families() -> None:
    """A family without examples would not be held against anything."""
    count = Counter(entry["config"]["model_type"] for entry in TABLE.values())
    assert all(count[model_type] >= 20 for model_type in ("llama", "mistral", "qwen2", "qwen3")), count
    # No config.json of a Seed-OSS model was found in a public repository.
    assert count.keys() == FAMILIES.keys() - {"seed_oss"}
    assert sum("refused" not in entry for entry in TABLE.values()) >= 80
