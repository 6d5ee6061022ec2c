"""transformers: the compressed-tensors library's rules, and a way of its own for packed zero points."""

from __future__ import annotations

from collections.abc import Sequence

from gs_dist.checkpoint.dialects.compressed_tensors.layout import scheme_groups
from gs_dist.checkpoint.engines.base import Engine
from gs_dist.checkpoint.engines.compressed_tensors_library import check_library, is_symmetric
from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep

__all__ = ["ENGINE"]

_LOADS_ZERO_POINTS = ("5.17", "5.19")
_DEQUANTIZE = "dequantize"  # rule of the note on packed zero points


def _check(inventory: Inventory, layout: Layout, version: str) -> None:
    """The library's rules; packed zero points are a note, since they load by a way of their own."""
    if not check_library(inventory, layout):
        return
    plainly = version.startswith(_LOADS_ZERO_POINTS)
    if not plainly and any(
        group.inputs is None and not is_symmetric(group.weights) for group in scheme_groups(inventory)
    ):
        inventory.note(
            _DEQUANTIZE,
            "packed zero points: transformers up to 5.19 loads them plainly, 5.24 with compressed-tensors 0.20 only by "
            "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)), as float weights",
        )


def _serve(dialect: str, architecture: DecoderArchitecture, notes: Sequence[Note]) -> str:
    dequantize = any(note.rule == _DEQUANTIZE for note in notes)
    more = ", CompressedTensorsConfig" if dequantize else ""
    option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if dequantize else ""
    return (
        "With transformers (`pip install transformers compressed-tensors`):\n\n```python\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{more}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{option})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```'
    )


ENGINE = Engine(
    name="transformers",
    title="transformers",
    dialects=("compressed-tensors",),
    token_step=TokenStep.OVER_127_5,  # through compressed-tensors
    check=_check,
    serve=_serve,
    versions=("5.17", "5.19", "5.24"),
)
