"""Config files of real models: read as transformers reads them, or refused for a reason that holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture

TABLE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "source_configs.json").read_text(encoding="utf-8")
)


def found(architecture: DecoderArchitecture) -> dict[str, Any]:
    """What was read, in the words of `tests/data/make_source_configs.py`."""
    attention, mlp = architecture.layers[0].attention, architecture.layers[0].mlp
    scaling = attention.rotary.scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rotary.theta}
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            rope[key] = getattr(scaling, key)
    eos = list(architecture.eos_token_ids)
    return {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_layers": architecture.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": architecture.rms_norm_eps,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "max_position_embeddings": architecture.max_position_embeddings,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "dtype": architecture.dtype,
        "rope": rope,
        "windows": sorted({str(layer.attention.window) for layer in architecture.layers}),
        "attention_bias": attention.qkv_bias,
        "mlp_bias": mlp.bias,
    }


@pytest.mark.parametrize("name", TABLE)
def test_a_real_config_is_read_as_transformers_reads_it_or_refused(name: str) -> None:
    """The class in transformers says what each key means; a refusal names the key for which there is one."""
    entry = TABLE[name]
    refusal = ""
    try:
        architecture = read_architecture(entry["config"])
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert entry.get("refused", "nothing: it is to be read") in refusal
    else:
        assert found(architecture) == {**entry["reading"], "dtype": entry["reading"]["dtype"] or "float32"}


def test_the_table_is_of_all_families() -> None:
    """A family without examples would not be held against anything."""
    count = Counter(entry["config"]["model_type"] for entry in TABLE.values())
    assert all(count[model_type] >= 13 for model_type in ("llama", "mistral", "qwen2", "qwen3")), count
    assert sum("refused" not in entry for entry in TABLE.values()) >= 50
