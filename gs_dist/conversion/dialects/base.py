"""What a dialect must tell of a converted linear: its tensors, a block of rows at a time, and the describing files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.conversion.schemes import Scheme
from gs_dist.errors import JobFailure
from gs_dist.solvers.weight_rounding import RoundedRows

__all__ = [
    "Array",
    "Assigned",
    "DialectWriter",
    "Encoding",
    "LinearShape",
    "fp8_codes",
    "paired_inputs",
    "stored_scale",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """A linear to be written: full name, output and input channels, and the dtype of the model's floats."""

    name: str
    rows: int
    columns: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """What became of a linear: `scheme` None where it stays in floats; `expert` for one of a mixture's."""

    name: str
    rows: int
    columns: int
    scheme: Scheme | None
    expert: bool


@dataclass(frozen=True, kw_only=True)
class Encoding(ABC):
    """How a linear of one scheme is written; `row_step` rows are encoded together."""

    row_step: int = 1

    @abstractmethod
    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        """Last name to form of every tensor."""

    @abstractmethod
    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        """The next values of its tensors, by last name, for a block of rows."""

    def constants(self, linear: LinearShape) -> dict[str, Array]:
        """Tensors that do not depend on values; none, unless a form has some."""
        return {}

    def misfit(self, linear: LinearShape) -> str | None:
        """Why it cannot be written so, and what to do; None if it can, as every linear unless a form says otherwise."""
        return None


def fp8_codes(codes: npt.NDArray[Any]) -> Array:
    """E4M3 bytes as the dtype of files."""
    return codes.view(ml_dtypes.float8_e4m3fn)


def paired_inputs(codes: npt.NDArray[Any]) -> Array:
    """Codes of 4 bits, a byte each, in pairs along the inputs: the lower half of a byte is the first."""
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4))


class DialectWriter(Protocol):
    """A dialect of checkpoints."""

    @property
    def name(self) -> str:
        """Spelling in a recipe's `format`; also the directory's name in the output."""

    def encoding(self, scheme: Scheme, *, expert: bool) -> Encoding | str:
        """How linears of a scheme are written; or why they are not, and what to do."""

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """Why schemes cannot stand in one checkpoint, and what to do; None if they can."""

    def config(self, source: Mapping[str, Any], linears: Sequence[Assigned]) -> dict[str, Any]:
        """Content of config.json, `source` being the source's, without any earlier quantisation."""

    def describe(self, tensors: Mapping[str, str], linears: Sequence[Assigned]) -> Mapping[str, Mapping[str, Any]]:
        """Name to JSON content of further files; `tensors` maps every tensor's name to the label of its linear."""


def stored_scale(scale: npt.NDArray[Any], dtype: str, where: str) -> Array:
    """Scales in the dtype that they were rounded to.

    Raises:
        JobFailure: they change by it.
    """
    cast = scale.astype(DTYPES[SPELLINGS[dtype]])
    if not np.array_equal(cast.astype(np.float32), scale):
        raise JobFailure(f"{where}: its scales are not rounded to {dtype}, so that codes and scales would disagree")
    return cast
