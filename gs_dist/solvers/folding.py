"""Rescaling an activation without changing the function of the layer.

Dividing the channels of an activation x by s is undone by multiplying the columns of every linear that
reads it. The division itself costs nothing when what produces x absorbs it: a norm's weight, or the rows
of the linear before it. Where keys and values are shared by several query heads, one row of `v_proj`
feeds a channel of each of them, so those channels must share their s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.model.decoder import LayerInput
from gs_dist.results.quantized import Float32
from gs_dist.solvers.affine import row_blocks
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["FoldedTensors", "Tensor", "source_channels", "source_index", "tie_max"]

Tensor = npt.NDArray[Any]


def _by_source(values: Tensor, layer_input: LayerInput) -> Tensor:
    """(channels,) as (KV heads, query heads of one, head_dim): query head h reads KV head h // repeat."""
    return values.reshape(-1, layer_input.repeat, layer_input.head_dim)


def tie_max(values: Tensor, layer_input: LayerInput) -> Tensor:
    """(channels,) with each value replaced by the largest among channels fed by the same row of the source."""
    if layer_input.repeat == 1:
        return values
    heads = _by_source(values, layer_input)
    return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(values.shape)


def source_channels(values: Tensor, layer_input: LayerInput) -> Tensor:
    """Tied values (channels,) as one value for each row of the source."""
    return values if layer_input.repeat == 1 else _by_source(values, layer_input)[:, 0, :].reshape(-1)


def source_index(layer_input: LayerInput) -> npt.NDArray[np.intp]:
    """(channels,) row of the source that each channel is made of."""
    channel = np.arange(layer_input.channels)
    if layer_input.repeat == 1:
        return channel
    head, within = np.divmod(channel, layer_input.head_dim)
    return np.asarray(head // layer_input.repeat * layer_input.head_dim + within, dtype=np.intp)


def _parts(tensor: Tensor) -> Iterable[slice]:
    """Rows of a matrix in blocks, a vector as a whole."""
    return row_blocks(tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (slice(None),)


class FoldedTensors:
    """A layer's tensors with rescalings applied when a tensor is asked for.

    Only vectors are held, so that a wide layer is never in memory as float32 at once. The source arrays
    are not changed, and a tensor that no rescaling touches is handed out as it is.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._columns: dict[str, Float32] = {}
        self._rows: dict[str, Float32] = {}
        self._replaced: dict[str, Tensor] = {}
        self._bias_shift: dict[str, Tensor] = {}

    def fold(self, layer_input: LayerInput, scale: Float32) -> Float32:
        """Divides an activation by `scale` (channels,), tied over shared source rows; returns the scale in force.

        A norm's weight is stored in the checkpoint's dtype, so the scale that counts is the ratio of the
        old weight to the rounded new one; the columns are multiplied by that ratio, which keeps the
        function exact. A channel whose new norm weight would vanish or overflow stays as it is. With no
        source nothing is divided and the caller divides x.

        Raises:
            UserError: a source linear would overflow the checkpoint's dtype.
        """
        scale = np.asarray(scale, dtype=np.float32)
        source = layer_input.source
        if source is not None:
            weight = self._tensors[f"{source}.weight"]
            if weight.ndim == 1:
                scale = self._fold_norm(source, scale)
            else:
                per_row = source_channels(scale, layer_input).astype(np.float32)
                self._rows[source] = self._rows.get(source, np.float32(1)) * per_row
        for linear in (*layer_input.linears, *layer_input.followers):
            self._columns[linear] = self._columns.get(linear, np.float32(1)) * scale
        return scale

    def shift(self, layer_input: LayerInput, shift: Float32) -> None:
        """Subtracts `shift` (channels,) from an activation by the bias of its source, which is made if there is none.

        Call before `fold` of the same input. Whoever rounds the readers adds to their biases what their weights
        make of the shift. With no source the caller subtracts it from x.
        """
        if layer_input.source is not None:
            name = f"{layer_input.source}.bias"
            self._bias_shift[name] = self._bias_shift.get(name, 0.0) - source_channels(shift, layer_input)

    def shift_in_force(self, layer_input: LayerInput, shift: Float32, scale: Float32) -> Float32:
        """What the source really subtracts after `shift` and `fold`, whose result `scale` is: (channels,).

        A norm's bias is stored in the checkpoint's dtype, and in bfloat16 a shift of 100 may become one of 99.5.
        """
        name = f"{layer_input.source}.bias"
        if name not in self._replaced:
            return shift
        before = self._tensors[name].astype(np.float32) if name in self._tensors else np.float32(0)
        return np.asarray(before - self._replaced[name].astype(np.float32) * scale, dtype=np.float32)

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of a linear's weight."""
        rows, columns = self._tensors[f"{linear}.weight"].shape
        return int(rows), int(columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors: the checkpoint's and the biases that shifts made, as `published` takes them."""
        return (*self._tensors, *sorted(name for name in self._made_biases() if name not in self._tensors))

    def _made_biases(self) -> set[str]:
        return {*self._bias_shift, *(name for name in self._replaced if name.endswith(".bias"))}

    def has_bias(self, owner: str) -> bool:
        """Whether the checkpoint holds a bias for that linear or norm."""
        return f"{owner}.bias" in self._tensors

    def passes_shift(self, layer_input: LayerInput) -> bool:
        """Whether subtracting from the source's bias subtracts the same from the input.

        So it is after a norm, and for the attention output, whose weights of the values add up to 1; the
        mlp activation multiplies the source by the gate.
        """
        source = layer_input.source
        if source is None:
            return True
        return self._tensors[f"{source}.weight"].ndim == 1 or source.rpartition(".")[2] == "v_proj"

    def weight(self, linear: str, rows: slice = slice(None)) -> Float32:
        """Weight (out, in) float32 of a linear after folding, or some of its rows; a new array.

        Raises:
            UserError: the tensor holds values that are not finite.
        """
        name = f"{linear}.weight"
        weight = self._tensors[name][rows].astype(np.float32)
        if not np.isfinite(weight).all():
            raise UserError(f"tensor {name} holds values that are not finite: the checkpoint is damaged")
        if linear in self._columns:
            weight *= self._columns[linear]
        if linear in self._rows:
            weight /= self._rows[linear][rows, None]
        return np.asarray(weight, dtype=np.float32)

    def whole_weight(self, linear: str, threads: Threads) -> Float32:
        """`weight` of all rows, which threads share."""
        source = self._tensors[f"{linear}.weight"]  # held: a mapping that decodes tensors would do so for each block
        whole = np.empty(source.shape, dtype=np.float32)

        def fill(rows: slice) -> None:
            whole[rows] = self.weight(linear, rows)

        threads.map(fill, row_blocks(*source.shape))
        return whole

    def column_max(self, linears: Sequence[str], threads: Threads = ONE_THREAD) -> Float32:
        """Largest magnitude of each column over all of `linears` (in,)."""

        def of_linear(linear: str) -> Float32:
            source = self._tensors[f"{linear}.weight"]  # held, as in `whole_weight`

            def of_rows(rows: slice) -> Float32:
                weight = self.weight(linear, rows)
                return np.asarray(np.abs(weight, out=weight).max(axis=0))

            return np.asarray(np.maximum.reduce(threads.map(of_rows, row_blocks(*source.shape))))

        return np.asarray(np.maximum.reduce(threads.map(of_linear, linears)))

    def bias(self, linear: str) -> Float32 | None:
        """Bias (out,) float32 after folding, None where there is none."""
        name = f"{linear}.bias"
        if name not in self._tensors and name not in self._bias_shift:
            return None
        bias = self._tensors[name].astype(np.float32) if name in self._tensors else np.float32(0)
        bias = bias + self._bias_shift.get(name, np.float32(0))
        if linear in self._rows:
            bias = bias / self._rows[linear]
        return np.asarray(bias, dtype=np.float32)

    def published(self, name: str) -> Tensor:
        """A tensor that stays in floating point, in its source dtype: the source array itself if untouched.

        Raises:
            UserError: folding would overflow the dtype, or the source holds values that are not finite.
        """
        if name in self._replaced:
            return self._replaced[name]
        owner, _, kind = name.rpartition(".")
        source = self._tensors.get(name, self._tensors[f"{owner}.weight"])  # a bias that was made has its dtype
        if kind == "bias" and (owner in self._rows or name in self._bias_shift):
            folded = self.bias(owner)
        elif kind == "weight" and source.ndim == 2 and (owner in self._rows or owner in self._columns):
            folded = self.weight(owner)
        else:
            if any(not np.isfinite(source[rows].astype(np.float32)).all() for rows in _parts(source)):
                raise UserError(f"tensor {name} holds values that are not finite: the checkpoint is damaged")
            return source
        with np.errstate(over="ignore"):
            stored = np.asarray(folded).astype(source.dtype)
        if not np.isfinite(stored.astype(np.float32)).all():
            raise UserError(
                f"tensor {name} overflows {source.dtype} when an outlier scale is folded into it: "
                "set outliers_suppression: none for its linears"
            )
        return stored

    def _fold_norm(self, source: str, scale: Float32) -> Float32:
        name = f"{source}.weight"
        old = self._replaced.get(name, self._tensors[name])
        wide = old.astype(np.float32)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            stored = (wide / scale).astype(old.dtype)
            rounded = stored.astype(np.float32)
            ratio = wide / rounded
        lost = (wide != 0) & ((rounded == 0) | ~np.isfinite(rounded) | ~np.isfinite(ratio))
        stored = np.where(lost, old, stored).astype(old.dtype)
        effective = np.where(lost, np.float32(1), np.where(wide == 0, scale, ratio)).astype(np.float32)
        self._replaced[name] = stored
        bias = f"{source}.bias"
        if bias in self._tensors or bias in self._bias_shift:
            present = self._tensors.get(bias, np.zeros_like(old))
            shifted = present.astype(np.float32) + self._bias_shift.pop(bias, np.float32(0))
            self._replaced[bias] = (shifted / effective).astype(present.dtype)
        return effective
