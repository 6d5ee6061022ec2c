"""What a layer was made from, told by the bytes as they were read: its own tensors, and what its input ran through.

A checkpoint's fingerprint looks at headers and edges of files; a checksum is taken of every tensor while it passes. So
a model that changed on the way is noticed, whichever of its weights it was, and nothing is read for it alone.

Checksums are XXH3 of 128 bits (xxhash): they guard against accidents, and run at several times the rate of crc32 or
sha256, faster than storage gives the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gs_dist.seal import joined

__all__ = ["EMBEDDING", "Lineage", "checksum_of", "checksums"]

Array = npt.NDArray[Any]

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Of one layer.

    Attributes:
        behind: checksum of everything that the layer's input ran through: embedding and source tensors of all layers
            before it.
        tensors: name within the layer to the checksum of each of its source tensors.
    """

    behind: str
    tensors: Mapping[str, str]

    @property
    def after(self) -> str:
        """What the next layer is behind of."""
        return joined(self.behind, self.own)

    @property
    def own(self) -> str:
        """Checksum of all of the layer's source tensors."""
        return joined(*(f"{name} {checksum}" for name, checksum in sorted(self.tensors.items())))

    def changed(self, tensors: Mapping[str, str]) -> list[str]:
        """Names of tensors whose checksums are others in `tensors`, sorted."""
        names = self.tensors.keys() | tensors.keys()
        return sorted(name for name in names if self.tensors.get(name) != tensors.get(name))


def checksums(tensors: Mapping[str, Array]) -> dict[str, str]:
    """Name to `checksum_of` of each."""
    return {name: checksum_of({"": array}) for name, array in tensors.items()}


def checksum_of(tensors: Mapping[str, Array], *texts: str) -> str:
    """Of named arrays and texts: names, dtypes, shapes and bytes in C order; nothing is copied.

    Of an array that does not lie in that order, a row at a time is.
    """
    digest = xxhash.xxh3_128()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for part in (array,) if array.flags.c_contiguous else array:
            # As bytes, since not every dtype (bfloat16) can be seen through the buffer protocol.
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    for text in texts:
        digest.update(f"\0{len(text)} ".encode() + text.encode())
    return digest.hexdigest()
