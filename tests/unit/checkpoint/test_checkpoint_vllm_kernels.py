"""Over how many cards vLLM splits packed weights, and which groups it has a kernel for."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from gs_dist.checkpoint.engines.vllm_kernels import PackedWeights, describe_tensor_parallel, takes_group_size
from gs_dist.model.families import read_architecture

QWEN2_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA_70B = {**QWEN2_72B, "intermediate_size": 28672}
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def packed(group_size: int, num_bits: int = 4, *, symmetric: bool = True) -> PackedWeights:
    return PackedWeights(num_bits=num_bits, group_size=group_size, symmetric=symmetric)


def note(weights: PackedWeights, dtype: str = "bfloat16", **sizes: Any) -> str | None:
    architecture = read_architecture(tiny_config("qwen2", torch_dtype=dtype, **sizes))
    names = [name for name in architecture.linear_names() if name != "lm_head"]
    return describe_tensor_parallel(dict.fromkeys(names, weights), architecture)


def test_groups_that_a_partition_would_cut_limit_the_cards() -> None:
    """29568 channels over two cards are 14784, a multiple of 64, which Hopper cards take, and not of 128."""
    wide, narrow = note(packed(128), **QWEN2_72B), note(packed(64), **QWEN2_72B)
    assert wide is not None
    assert narrow is not None
    assert wide.startswith(
        "vLLM goes up to tensor_parallel_size 1, then --pipeline-parallel-size: model.layers.0.mlp.down"
    )
    assert "29568 channels in groups of 128, and a card takes a multiple of 128" in wide
    assert "tensor_parallel_size 1 (2 on Hopper cards)" in narrow


def test_nothing_is_said_where_the_heads_stop_first() -> None:
    """Sixteen cards hold whole groups of Llama-3-70B, and a linear that is not packed sets no limit."""
    assert note(packed(128), **LLAMA_70B) is None
    architecture = read_architecture(tiny_config("qwen2", **QWEN2_72B))
    assert describe_tensor_parallel({"model.layers.0.mlp.up_proj": packed(128)}, architecture) is None
    assert describe_tensor_parallel({}, architecture) is None


def test_a_linear_that_no_kernel_takes_is_named_with_the_way_out() -> None:
    """576 channels are no multiple of 128: symmetric groups run in float16 all the same, others do not."""
    symmetric, asymmetric = note(packed(64), **SMOLLM), note(packed(64, symmetric=False), **SMOLLM)
    assert symmetric is not None
    assert asymmetric is not None
    assert "does not run this model on one CUDA card" in symmetric
    assert "self_attn.o_proj reads 576 channels" in symmetric
    assert symmetric.endswith("with --dtype float16 it does")
    assert "float16" not in asymmetric
    assert note(packed(64), "float16", **SMOLLM) is None
    assert note(packed(0, 8), **SMOLLM) is None


@given(
    st.integers(1, 40), st.sampled_from([64, 128]), st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([128, 4096])
)
def test_the_limit_is_the_largest_that_gives_every_card_whole_tiles(
    tiles: int, group_size: int, heads: int, hidden: int
) -> None:
    """Found by trying every number of cards: each share must be of 128 channels and of whole groups."""
    inner = tiles * 128
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": 4096 // heads}
    cards = [n for n in (1, 2, 4, 8, 16) if heads % n == 0]
    fits = [n for n in cards if inner % n == 0 and inner // n % 128 == 0 and inner // n % group_size == 0]
    text = note(packed(group_size), **{**sizes, "num_key_value_heads": 1})
    assert (text is None) == (fits[-1] == cards[-1])
    if text is not None:
        assert f"tensor_parallel_size {fits[-1]}" in text


@pytest.mark.parametrize(
    ("weights", "dtype", "taken"),
    [
        (packed(0), "bfloat16", True),
        (packed(64), "bfloat16", True),
        (packed(128, symmetric=False), "float16", True),
        (packed(256), "bfloat16", False),
        (packed(256), "float16", True),
        (packed(256, symmetric=False), "float16", False),
    ],
)
def test_groups_with_a_kernel(weights: PackedWeights, dtype: str, taken: bool) -> None:
    """64 and 128 and whole rows; 256 in float16 and symmetric alone."""
    assert takes_group_size(weights, dtype) is taken
