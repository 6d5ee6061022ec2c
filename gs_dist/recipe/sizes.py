"""Sizes in bytes: as people write and read them, and what a weight takes on storage."""

from __future__ import annotations

import re

from gs_dist.model.dtypes import FLOATS
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["DECODED_HELD", "GIB", "SIZE_HELP", "format_bytes", "parse_size", "stored_bytes"]

GIB = 1 << 30

DECODED_HELD = 4
"""Decoded weights that a reader keeps: a solver reads some in turns, a block of rows at a time."""

_SIZE_UNITS = {"B": 1} | {
    f"{prefix}{binary}B": base**power
    for binary, base in (("i", 1024), ("", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
SIZE_HELP = "a size such as 60GiB, 512MiB or 8GB"


def parse_size(value: object) -> int:
    """Bytes of `60GiB`, `512MiB`, `8GB` or a whole number; the B may be left out, as Kubernetes does (`60Gi`).

    Raises:
        ValueError: anything else, or less than one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]i?B?|B)\s*", value) if isinstance(value, str) else None
    if match is not None and float(match[1]) > 0:
        return max(1, int(float(match[1]) * _SIZE_UNITS[match[2].removesuffix("B") + "B"]))
    raise ValueError(f"{value!r} is not a size: write {SIZE_HELP}")


def format_bytes(size: int) -> str:
    """Bytes as people read them: `17.2 GiB`, `512 MiB`."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def stored_bytes(policy: QuantPolicy | None, shape: tuple[int, int], scale_dtype: str) -> int:
    """Bytes of a weight (out, in) with its scales and zero points; `None` is the weight in `scale_dtype`."""
    rows, columns = shape
    if policy is None or not policy.quantizes_linear:
        return rows * columns * FLOATS[scale_dtype].itemsize
    groups = columns // policy.group_size if policy.group_size else 1
    form = policy.weight_format
    zero_bits = 0 if policy.weight_symmetric else form.bits
    scale_bits = form.scale_bits or 8 * FLOATS[scale_dtype].itemsize
    bits = rows * columns * form.bits + rows * groups * (zero_bits + scale_bits)
    return -(-bits // 8)
