"""Which weights of packed integers vLLM has a kernel for on CUDA cards, and over how many cards it splits them.

As the chooser of vLLM 0.32.0 answers (`kernels/linear/__init__.py`, choose_mp_linear_kernel), told that it runs on such
cards: `tests/data/make_vllm_kernels.py` asks it for each combination, and a test holds this module against the answers.
They come from `kernels/linear/mixed_precision/marlin.py` (can_implement: groups, which a card must hold whole; other
sizes are padded, since 0.24), `triton_w4a16.py` (4 bits in groups of 256 too), `exllama.py` (symmetric weights in
float16) and `machete.py` (Hopper alone). Kernels of packages that vLLM does not bring along are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gs_dist.model.decoder import DecoderArchitecture

__all__ = ["MARLIN_GROUP_SIZES", "PackedWeights", "describe_tensor_parallel", "needs_hopper", "takes_group_size"]

MARLIN_GROUP_SIZES = (0, 32, 64, 128)
_GROUP_SIZES_OF_INT4 = (*MARLIN_GROUP_SIZES, 256)  # and Triton's
_MOST_CARDS = 16
_ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """How a linear of weights alone is stored: `group_size` is 0 per channel."""

    num_bits: int
    group_size: int
    symmetric: bool


def takes_group_size(weights: PackedWeights, dtype: str) -> bool:
    """Whether a kernel takes such groups; Exllama, for symmetric weights in float16 models, takes any."""
    sizes = _GROUP_SIZES_OF_INT4 if weights.num_bits == 4 else MARLIN_GROUP_SIZES
    return weights.group_size in sizes or (weights.symmetric and weights.group_size > 0 and dtype == "float16")


def needs_hopper(weights: PackedWeights) -> bool:
    """Whether Machete alone takes them, which runs on Hopper cards, for output channels in whole tiles of 128."""
    return weights.num_bits == 8 and not weights.symmetric


def describe_tensor_parallel(linears: Mapping[str, PackedWeights], architecture: DecoderArchitecture) -> str | None:
    """How far `tensor_parallel_size` goes where packed weights stop it before the attention heads do, else None.

    Looked at are the linears whose input channels are spread over the cards.

    Args:
        linears: packed linears by full name.
        architecture: of the model.
    """
    most = _powers_of_two(architecture.num_heads)[-1]
    found = {}
    for name, weights in linears.items():
        if name.endswith(_ROW_PARALLEL):
            channels = next(x.in_features for kind in architecture.kinds for x in kind.linears if name.endswith(x.name))
            found[name] = (_most_cards(channels, weights.group_size or 1, architecture), channels)
    if not found:
        return None
    name, (limit, channels) = min(found.items(), key=lambda item: item[1][0])
    if limit >= most:
        return None
    size = linears[name].group_size
    return (
        f"vLLM goes up to tensor_parallel_size {limit}, then --pipeline-parallel-size: {name} reads {channels} "
        f"channels in groups of {size}, and a card takes whole groups"
    )


def _most_cards(channels: int, step: int, architecture: DecoderArchitecture) -> int:
    sizes = [size for size in _powers_of_two(architecture.num_heads) if channels % (size * step) == 0]
    return max(sizes, default=0)


def _powers_of_two(num_heads: int) -> list[int]:
    """Numbers of cards that the attention heads can be spread over (vLLM `config/model.py`)."""
    return [2**k for k in range(_MOST_CARDS.bit_length()) if num_heads % 2**k == 0]
