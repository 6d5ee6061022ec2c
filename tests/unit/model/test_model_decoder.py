"""What a config.json says, in both of transformers' spellings, and what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from checkpoints import tensor_shapes, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.model.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(base: str = "llama", **overrides: Any) -> DecoderArchitecture:
    return read_architecture({**tiny_config(base), **overrides})


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"]
)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tensors_are_those_the_model_class_saves(model_type: str, tie: bool, bias: bool) -> None:
    """Names and shapes agree with the checkpoint of that model type, biases and tied heads included."""
    bias_keys = {
        "llama": ("attention_bias", "mlp_bias"),
        "qwen3": ("attention_bias",),
        "olmo2": ("attention_bias",),
    }.get(model_type, ())
    config = tiny_config(model_type, tie_word_embeddings=tie, **dict.fromkeys(bias_keys, bias))
    architecture = read_architecture(config)
    found = architecture.outer_tensors()
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        found.update({prefix + name: shape for name, shape in architecture.layer_tensors(layer).items()})
    assert found == tensor_shapes(config)


def test_llama_70b_by_its_published_config() -> None:
    """Sizes of Meta-Llama-3-70B come out as published."""
    architecture = parse(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    assert (architecture.head_dim, architecture.kv_size, architecture.query_size) == (128, 1024, 8192)
    assert len(architecture.linear_names()) == 80 * 7 + 1


def test_absent_key_value_heads_mean_one_for_each_query_head() -> None:
    """Old llama configs know no grouped-query attention."""
    config = tiny_config()
    del config["num_key_value_heads"]
    assert read_architecture(config).num_kv_heads == 4


def test_qwen3_head_dim_is_not_derived() -> None:
    """Without head_dim Qwen3 has 128, whatever hidden_size and heads say."""
    config = tiny_config("qwen3")
    del config["head_dim"]
    assert read_architecture(config).head_dim == 128


@pytest.mark.parametrize(
    ("overrides", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 500000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, LinearScaling(factor=2.0)),
        ({"rope_scaling": LLAMA3}, 10000.0, Llama3Scaling(factor=8.0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512}},
            10000.0,
            YarnScaling(factor=4.0, original_max_position_embeddings=512),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 512, "beta_fast": 16}},
            10000.0,
            YarnScaling(factor=8.0, original_max_position_embeddings=512, beta_fast=16.0),
        ),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_theta": None, "rope_parameters": {**LLAMA3, "factor": 32.0, "rope_theta": 5e5}},
            5e5,
            Llama3Scaling(factor=32.0),
        ),
    ],
)
def test_rope_in_both_spellings(overrides: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """`rope_theta` with `rope_scaling`, and `rope_parameters`, mean the same."""
    architecture = parse(**overrides)
    rotary = architecture.layers[0].attention.rotary
    assert (rotary.theta, rotary.scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_dtype_in_both_spellings(overrides: dict[str, Any], dtype: str) -> None:
    """`torch_dtype` and `dtype` are the same key; without either it is float32."""
    assert parse(**overrides).dtype == dtype


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 7], (2, 7)), (None, ())])
def test_end_of_text_tokens(value: Any, ids: tuple[int, ...]) -> None:
    """`eos_token_id` may be one id, several, or none."""
    assert parse(eos_token_id=value).eos_token_ids == ids


@pytest.mark.parametrize(
    ("model_type", "overrides", "window"),
    [
        ("llama", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 64),
    ],
)
def test_sliding_window(model_type: str, overrides: dict[str, Any], window: int | None) -> None:
    """Mistral's window is on by its size, Qwen's by `use_sliding_window` and by layer; llama has none."""
    assert {layer.attention.window for layer in parse(model_type, **overrides).layers} == {window}


@pytest.mark.parametrize(
    "overrides", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_windows_may_differ_by_layer(overrides: dict[str, Any]) -> None:
    """`max_window_layers` counts the layers without a window from the first; `layer_types` names each."""
    architecture = parse("qwen2", use_sliding_window=True, sliding_window=64, **overrides)
    assert [layer.attention.window for layer in architecture.layers] == [None, 64]


@pytest.mark.parametrize(("share", "channels"), [({}, 16), ({"partial_rotary_factor": 1.0}, 32)])
def test_a_family_may_turn_some_channels_of_a_head(share: dict[str, Any], channels: int) -> None:
    """GLM's embedding turns half of each head unless config.json says otherwise."""
    config = tiny_config("glm4_moe")
    del config["partial_rotary_factor"]
    assert read_architecture({**config, **share}).layers[0].attention.rotary.channels == channels


def test_a_dynamic_embedding_is_refused_with_what_to_write() -> None:
    """It is stretched by the text's length in transformers and always in vLLM, so that it has no one arithmetic."""
    with pytest.raises(CheckpointError) as refused:
        parse(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}' in str(refused.value)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_says_what_reads_what(family: str) -> None:
    """Queries' latent is normed and may be rescaled; what expands the other latent stays as it is."""
    layer = parse(family).layers[0]
    assert [(i.name, i.linears, i.source) for i in layer.attention.inputs("n")] == [
        ("attention_input", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "n"),
        ("query_latent", ("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
        ("attention_output", ("self_attn.o_proj",), None),
    ]
    assert [linear.name for linear in layer.linears if linear.stays] == ["self_attn.kv_b_proj"]
    direct = parse(family, q_lora_rank=None).layers[0]
    assert direct.inputs[0].linears == ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("deepseek_v3", {"num_key_value_heads": 2}, "must be equal"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group groups hold 2 experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ],
)
def test_what_engines_compute_otherwise_is_refused(family: str, overrides: dict[str, Any], message: str) -> None:
    """The message names the key."""
    with pytest.raises(CheckpointError, match=message):
        parse(family, **overrides)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("model_type", {"model_type": "gpt2"}),
    ("model_type", {"model_type": ["llama"]}),
    ("model_type", {"model_type": None}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
    ("rope_scaling.type", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "longrope"}}),
    ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("rope_scaling.factor", {"rope_scaling": {"rope_type": "linear"}}),
    ("rope_scaling.low_freq_factor", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}),
    ("rope_scaling.original_max", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8k"}}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("torch_dtype", {"torch_dtype": "int8"}),
    ("torch_dtype", {"torch_dtype": 16}),
    ("hidden_size", {"hidden_size": "64"}),
    ("hidden_size", {"hidden_size": 64.0}),
    ("hidden_size", {"hidden_size": None}),
    ("hidden_size", {"hidden_size": 2**40}),
    ("hidden_size", {"hidden_size": 66}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    ("num_hidden_layers", {"num_hidden_layers": True}),
    ("num_attention_heads", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 15}),
    ("vocab_size", {"vocab_size": -1}),
    ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    ("attention_bias", {"attention_bias": 1}),
    ("eos_token_id", {"eos_token_id": ["</s>"]}),
    ("eos_token_id", {"eos_token_id": -2}),
]


@pytest.mark.parametrize(("key", "overrides"), REFUSED)
def test_what_is_not_served_is_refused_by_key(key: str, overrides: dict[str, Any]) -> None:
    """A value that would silently give another model, or none, is refused and the key named."""
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        parse(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", {}]},
        {"max_window_layers": "all"},
    ],
)
def test_windows_of_unknown_layers_are_refused(overrides: dict[str, Any]) -> None:
    """A list of kinds must name every layer, with kinds that are known."""
    with pytest.raises(CheckpointError, match=r"max_window_layers|layer_types"):
        parse("qwen2", use_sliding_window=True, **overrides)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first text loads Unicode's tables
@given(st.dictionaries(st.sampled_from(sorted([*tiny_config("qwen2"), "rope_scaling", "layer_types"])), JSON))
def test_no_value_ends_in_anything_but_a_checkpoint_error(overrides: dict[str, Any]) -> None:
    """Whatever JSON holds, reading it gives an architecture or a CheckpointError."""
    with contextlib.suppress(CheckpointError):
        architecture = read_architecture({**tiny_config("qwen2"), **overrides})
        assert architecture.num_heads % architecture.num_kv_heads == 0
