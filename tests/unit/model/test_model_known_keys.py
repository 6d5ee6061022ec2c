"""No key of a config.json passes unseen: it is read, known not to matter, refused, or told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.families import KNOWN_KEYS, read_architecture, unknown_keys
from gs_dist.model.known_keys import FOREIGN, HARMLESS, READ
from gs_dist.model.rotary import Llama3Scaling

DATA = Path(__file__).parents[2] / "data"
CLASSES: dict[str, dict[str, Any]] = json.loads((DATA / "config_keys.json").read_text())["classes"]
GENERATION: list[str] = json.loads((DATA / "config_keys.json").read_text())["generation"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def parse(model_type: str = "llama", **overrides: Any) -> Any:
    return read_architecture({**tiny_config(model_type), **overrides})


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_key_of_the_class_is_decided_on(model_type: str) -> None:
    """Each key of the family's class in transformers is read, listed as harmless, or held to a value."""
    known = KNOWN_KEYS[model_type]
    decided = READ | HARMLESS | known.read | known.ignored | set(known.fixed) | set(FOREIGN)
    assert set(CLASSES[model_type]) <= decided
    assert set(GENERATION) <= decided


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_of_the_class_are_served_and_hold_for_absent_keys(model_type: str) -> None:
    """A config.json that states every default reads like one that states none."""
    sizes = {key: tiny_config(model_type)[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers")}
    stated = {**CLASSES[model_type], **sizes, "model_type": model_type}
    stated |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128}
    stated["layer_types"] = None  # the default follows from the number of layers
    if stated.get("num_experts_per_tok", 1) is None:  # DeepSeek-V2's class has no default, and needs one
        stated["num_experts_per_tok"] = 2
    kept = {"num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "model_type", *sizes}
    bare = {key: stated[key] for key in {*kept, *({"num_experts_per_tok"} & set(stated))}}
    bare["eos_token_id"] = stated["eos_token_id"]
    assert read_architecture(stated) == read_architecture(bare)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_read_key_is_one_that_is_asked_for(model_type: str) -> None:
    """What is listed as read really is, so that the list cannot grow stale."""
    asked: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

    windows = {"use_sliding_window": True, "sliding_window": 8}
    own = {key: value for key, value in windows.items() if key in KNOWN_KEYS[model_type].read}
    config = tiny_config(model_type, **own, rope_scaling=dict(LLAMA3), rope_parameters=None)
    KNOWN_KEYS[model_type].refuse_others(ConfigKeys(config))
    from gs_dist.model.families import FAMILIES

    keys = ConfigKeys(Recorder(config))
    keys.choice("hidden_act", ("silu",))
    FAMILIES[model_type](keys)
    heeded = (READ - KNOWN_KEYS[model_type].ignored) | KNOWN_KEYS[model_type].read
    assert heeded <= asked | {"tie_word_embeddings"}


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "is_causal", False),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "embedding_multiplier", 12.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logit_scale", 0.0625),
        ("llama", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "num_local_experts", 8),
        ("llama", "pruned_heads", {"0": [1]}),
        ("llama", "transformers_weights", "other.safetensors"),
        ("mistral", "attention_bias", True),
        ("qwen2", "mlp_bias", True),
        ("qwen3", "use_qk_norm", False),
        ("olmo2", "clip_qkv", 8.0),
        ("qwen3", "is_causal", False),
        ("qwen3", "per_layer_config", {"0": {"hidden_size": 32}}),
        ("qwen2", "vision_config", {}),
    ],
)
def test_a_key_by_which_engines_compute_otherwise_is_refused(model_type: str, key: str, value: Any) -> None:
    """Whether or not transformers' class of this type heeds it."""
    with pytest.raises(CheckpointError, match=rf"^config\.json: {key} is "):
        parse(model_type, **{key: value})


@pytest.mark.parametrize(
    "overrides",
    [
        {"is_causal": True},
        {"partial_rotary_factor": 1.0},
        {"attn_logit_softcapping": None},
        {"embedding_multiplier": 1},
        {"layer_types": ["full_attention", "full_attention"]},
        {"pruned_heads": {}},
        {"attention_dropout": 0.5},
        {"is_encoder_decoder": False, "num_experts": 0, "vision_config": None},
    ],
)
def test_a_key_at_the_value_that_changes_nothing_is_served(overrides: dict[str, Any]) -> None:
    """What a base class wrote into every file is no reason to refuse."""
    assert parse(**overrides) == parse()
    assert unknown_keys(tiny_config(**overrides)) == ()


def test_a_window_that_llama_does_not_have_is_told() -> None:
    """Mistral models converted to Llama state one, and transformers' class does not heed it."""
    assert parse(sliding_window=64) == parse()
    assert unknown_keys(tiny_config(sliding_window=64)) == ("sliding_window",)
    assert unknown_keys(tiny_config(sliding_window=None)) == ()


def test_a_key_nobody_knows_is_told() -> None:
    """At the top and within the tables of the rotary embedding."""
    config = tiny_config(some_new_attention=2, rope_scaling={"rope_type": "default", "stretch": 3})
    assert unknown_keys(config) == ("rope_scaling.stretch", "some_new_attention")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForSequenceClassification", "a classifier, reward model or reranker"),
        ("LlamaModel", "a decoder without head, as embedding models are saved"),
        ("LlamaForCausalLMEagle3", "a draft model"),
        ("MistralForCausalLM", "which is not served"),
    ],
)
def test_another_class_than_the_types_own_is_refused(architecture: str, kind: str) -> None:
    """VLLM chooses by `architectures`, transformers by `model_type`."""
    with pytest.raises(CheckpointError) as refused:
        parse(architectures=[architecture])
    assert f"architectures names '{architecture}', {kind}" in str(refused.value)
    assert "write 'LlamaForCausalLM' there" in str(refused.value)
    assert parse(architectures=None) == parse(architectures=[]) == parse()


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "two tables",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "which are two embeddings",
    ),
    (
        "YaRN beside a plain table",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        "which are two embeddings",
    ),
    (
        "two bases",
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_theta is 10000.0 and rope_parameters.rope_theta is 500000.0: engines differ",
    ),
    (
        "a base that does not count",
        {
            "rope_theta": None,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
        },
        "rope_theta stands in rope_parameters, which does not count beside rope_scaling",
    ),
    (
        "two lengths",
        {"rope_scaling": dict(LLAMA3), "original_max_position_embeddings": 2048},
        "original_max_position_embeddings is 2048 and rope_scaling.original_max_position_embeddings is 1024",
    ),
    ("two types", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "rope_scaling.type is"),
    ("two dtypes", {"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype is 'bfloat16' and torch_dtype is 'float16'"),
]


@pytest.mark.parametrize(("overrides", "message"), [r[1:] for r in CONTRADICTIONS], ids=[r[0] for r in CONTRADICTIONS])
def test_a_config_that_says_two_things_is_refused(overrides: dict[str, Any], message: str) -> None:
    """Versions of transformers and engines differ on which of the two counts."""
    with pytest.raises(CheckpointError) as refused:
        parse(**overrides)
    assert message in str(refused.value)


def test_what_two_places_say_alike_is_read() -> None:
    """Files that carry both spellings, one for each version of transformers, are common."""
    both = {"rope_theta": 5e5, "rope_scaling": dict(LLAMA3), "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    wanted = Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=1024,
    )
    rotary = parse(**both).layers[0].attention.rotary
    assert (rotary.theta, rotary.scaling) == (5e5, wanted)
    assert parse(torch_dtype="bfloat16", dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("beside", "length"), [({"original_max_position_embeddings": 2048}, 2048), ({"max_position_embeddings": 512}, 512)]
)
def test_llama3_takes_its_length_from_where_transformers_does(beside: dict[str, Any], length: int) -> None:
    """From beside the table, or the model's own length, where the table does not state it."""
    table = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    rotary = parse(rope_scaling=table, **beside).layers[0].attention.rotary
    assert rotary.scaling.original_max_position_embeddings == length


@pytest.mark.interop
def test_the_recorded_keys_are_those_of_the_installed_classes() -> None:
    """The lists are of the transformers that is installed, not of one long gone."""
    pytest.importorskip("transformers", reason="needs the [interop] extra")
    spec = importlib.util.spec_from_file_location("make_config_keys", DATA / "make_config_keys.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for model_type, keys in CLASSES.items():
        assert set(made.class_keys(model_type)) <= set(keys), model_type
    assert set(made.generation_keys()) <= set(GENERATION)
