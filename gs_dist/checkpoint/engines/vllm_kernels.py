"""Which weights of packed integers vLLM has a kernel for on CUDA cards, and over how many cards it splits them.

Sources: vLLM `kernels/linear/mixed_precision/marlin.py`, `machete.py`, `allspark.py`, `exllama.py` (can_implement),
`layers/quantization/utils/marlin_utils.py` (MARLIN_SUPPORTED_GROUP_SIZES, verify_marlin_supports_shape),
`machete_utils.py` (group sizes, check_machete_supports_shape), `allspark_utils.py` (int8 per channel),
`schemes/compressed_tensors_wNa16.py` (a card holds whole groups). Kernels of packages that vLLM does not bring
along are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gs_dist.model.decoder import DecoderArchitecture

__all__ = ["PackedWeights", "describe_tensor_parallel", "takes_group_size"]

GROUP_SIZES = (32, 64, 128)  # Marlin's and Machete's together
_MARLIN_CHANNELS = 128  # GPTQ_MARLIN_MIN_THREAD_K
_ALLSPARK_CHANNELS = 16  # ALLSPARK_AMPERE_K_ALIGN
_MACHETE_BLOCK = (64, 128)  # MACHETE_PREPACKED_BLOCK_SHAPE: input and output channels
_MACHETE_GROUP_SIZES = (0, 64, 128)
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
    return weights.group_size in (0, *GROUP_SIZES) or _is_exllamas(weights, dtype)


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
            found[name] = (_limit(channels, weights, architecture), channels)
    if not found:
        return None
    name, (limit, channels) = min(found.items(), key=lambda item: item[1][0])
    if limit >= most:
        return None
    weights = linears[name]
    groups = f" in groups of {weights.group_size}" if weights.group_size else ""
    step = _step(weights, architecture.dtype)
    reason = f"{name} reads {channels} channels{groups}, and a card takes a multiple of {step}"
    hopper = min(_limit_on_hopper(found[other][1], linears[other], architecture) for other in found)
    more = f" ({hopper} on Hopper cards)" if hopper > limit else ""
    if limit:
        return f"vLLM goes up to tensor_parallel_size {limit}{more}, then --pipeline-parallel-size: {reason}"
    way = "; with --dtype float16 it does" if weights.group_size and weights.symmetric else ""
    return f"vLLM does not run this model on one CUDA card{more}: {reason}{way}"


def _is_exllamas(weights: PackedWeights, dtype: str) -> bool:
    return weights.symmetric and weights.group_size > 0 and dtype == "float16"


def _step(weights: PackedWeights, dtype: str) -> int:
    """What a card's share of the input channels must be a multiple of."""
    if _is_exllamas(weights, dtype):
        return weights.group_size
    if weights.num_bits == 8 and weights.symmetric and not weights.group_size:
        return _ALLSPARK_CHANNELS
    return math.lcm(weights.group_size or 1, _MARLIN_CHANNELS)


def _limit(channels: int, weights: PackedWeights, architecture: DecoderArchitecture) -> int:
    """The most cards, 0 where the linear does not run at all."""
    return _most_cards(channels, _step(weights, architecture.dtype), architecture)


def _limit_on_hopper(channels: int, weights: PackedWeights, architecture: DecoderArchitecture) -> int:
    """The same with Machete, which needs less of the input channels."""
    inputs, outputs = _MACHETE_BLOCK
    if weights.group_size not in _MACHETE_GROUP_SIZES or architecture.hidden_size % outputs:
        return _limit(channels, weights, architecture)
    return _most_cards(channels, math.lcm(weights.group_size or 1, inputs), architecture)


def _most_cards(channels: int, step: int, architecture: DecoderArchitecture) -> int:
    sizes = [size for size in _powers_of_two(architecture.num_heads) if channels % (size * step) == 0]
    return max(sizes, default=0)


def _powers_of_two(num_heads: int) -> list[int]:
    """Numbers of cards that the attention heads can be spread over (vLLM `config/model.py`)."""
    return [2**k for k in range(_MOST_CARDS.bit_length()) if num_heads % 2**k == 0]
