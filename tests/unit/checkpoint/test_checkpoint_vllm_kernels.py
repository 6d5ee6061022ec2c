"""Over how many cards vLLM splits packed weights, and which groups it has a kernel for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from gs_dist.checkpoint.engines import vllm_kernels
from gs_dist.checkpoint.engines.vllm_kernels import (
    PackedWeights,
    describe_tensor_parallel,
    needs_hopper,
    takes_group_size,
)
from gs_dist.model.families import read_architecture

ANSWERS = json.loads((Path(__file__).parents[2] / "data" / "vllm_kernels.json").read_text())
HOPPER = "9.0"
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
    """29568 channels are 231 groups of 128, which no two cards share, and 462 of 64, which two do."""
    wide, narrow = note(packed(128), **QWEN2_72B), note(packed(64), **QWEN2_72B)
    assert wide is not None
    assert narrow is not None
    assert wide.startswith(
        "vLLM goes up to tensor_parallel_size 1, then --pipeline-parallel-size: model.layers.0.mlp.down"
    )
    assert "29568 channels in groups of 128, and a card takes whole groups" in wide
    assert "tensor_parallel_size 2" in narrow


def test_nothing_is_said_where_the_heads_stop_first() -> None:
    """Sixteen cards hold whole groups of Llama-3-70B, and a linear that is not packed sets no limit."""
    assert note(packed(128), **LLAMA_70B) is None
    architecture = read_architecture(tiny_config("qwen2", **QWEN2_72B))
    assert describe_tensor_parallel({"model.layers.0.mlp.up_proj": packed(128)}, architecture) is None
    assert describe_tensor_parallel({}, architecture) is None


def test_channels_that_are_no_whole_tiles_are_padded() -> None:
    """576 channels are no multiple of 128, and vLLM pads them since 0.24."""
    for weights in (packed(64), packed(64, symmetric=False), packed(0), packed(0, 8)):
        assert note(weights, **SMOLLM) is None


@given(
    st.integers(1, 40), st.sampled_from([64, 128]), st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([128, 4096])
)
def test_the_limit_is_the_largest_that_gives_every_card_whole_groups(
    tiles: int, group_size: int, heads: int, hidden: int
) -> None:
    """Found by trying every number of cards: each share must be of whole groups."""
    inner = tiles * 128
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": 4096 // heads}
    cards = [n for n in (1, 2, 4, 8, 16) if heads % n == 0]
    fits = [n for n in cards if inner % n == 0 and inner // n % group_size == 0]
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
        (packed(256), "bfloat16", True),
        (packed(256, 8), "bfloat16", False),
        (packed(256, 8), "float16", True),
        (packed(512), "bfloat16", False),
        (packed(256), "float16", True),
        (packed(256, symmetric=False), "float16", True),
    ],
)
def test_groups_with_a_kernel(weights: PackedWeights, dtype: str, taken: bool) -> None:
    """32 to 128 and whole rows; 256 at four bits; others symmetric and in float16 alone."""
    assert takes_group_size(weights, dtype) is taken


def answers(whole: bool) -> list[tuple[dict[str, Any], int, str | None]]:
    """Combination, group and kernel that vLLM chooses, where a card's share of the channels is all of them, or not."""
    return [
        (row, group, kernel)
        for row in ANSWERS["rows"]
        for group, kernel in zip(ANSWERS["groups"], row["kernels"], strict=True)
        if (row["in_out_share"][0] == row["in_out_share"][2]) is whole and row["in_out_share"][0] % (group or 1) == 0
    ]


def test_a_kernel_is_told_of_where_vllms_own_chooser_finds_one() -> None:
    """On cards before and after Hopper; the module names the version that was asked."""
    assert f"vLLM {ANSWERS['vllm']} answers" in (vllm_kernels.__doc__ or "").replace("\n", " ")
    seen = 0
    for row, group, kernel in answers(whole=True):
        weights = packed(group, row["num_bits"], symmetric=row["symmetric"])
        if row["capability"] != HOPPER:
            expected = takes_group_size(weights, row["dtype"]) and not needs_hopper(weights)
            assert (kernel is not None) is expected, (row, group, kernel)
            seen += 1
    assert seen > 200


def test_eight_bits_with_zero_points_have_a_kernel_on_hopper_alone() -> None:
    """Machete, where output channels are whole tiles."""
    for row, group, kernel in answers(whole=True):
        if row["num_bits"] == 8 and not row["symmetric"]:
            tiles = row["in_out_share"][1] % 128 == 0
            chosen = row["capability"] == HOPPER and tiles and group in (0, 64, 128)
            assert kernel == ("Machete" if chosen else None), (row, group)


def test_a_card_takes_whole_groups() -> None:
    """Where a share is none, Marlin refuses; the others leave that to `compressed_tensors_wNa16.py`, create_weights."""
    for row, group, kernel in answers(whole=False):
        share = row["in_out_share"][2]
        weights = packed(group, row["num_bits"], symmetric=row["symmetric"])
        marlins = row["capability"] != HOPPER and row["dtype"] == "bfloat16" and group in (32, 64, 128)
        if marlins and not needs_hopper(weights):
            assert (kernel is not None) is (share % group == 0), (row, group)
