"""Whether a converted directory is made of a source: every tensor of the source is found again, in floats or rounded.

A conversion moves nothing between tensors, so that what stays has the source's bytes, and each linear is compared with
its weight as it stands. No network need be known. Memory is bounded by the largest linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.source_comparison import LIMITS, judge_weight
from gs_dist.checkpoint.sources.catalogue import Carried, LinearRows, Weight, carried_bytes, take_catalogue
from gs_dist.checkpoint.sources.directory import SourceDirectory, TensorBytes
from gs_dist.checkpoint.sources.matrix import Float32, numpy_dtype
from gs_dist.checkpoint.stored_linear import code_tensors, has_shape, linear_bits, restored_weight

__all__ = ["compare_converted"]

_ROWS = 64  # read of a source's weight at a time


def compare_converted(inventory: Inventory, layout: Layout, sound: set[str], source: SourceDirectory) -> str:
    """Reports tensors that are not the source's, and linears that are not its roundings.

    Args:
        inventory: problems go to it.
        layout: kinds of linears.
        sound: tensors whose form and values are right; only those are looked at.
        source: what the directory is said to be made of, floats or quantised already.

    Returns:
        In words how far the linears are from their source.

    Raises:
        CheckpointError: the source cannot be used.
    """
    catalogue = take_catalogue(source)
    comparison = _Comparison(inventory, layout, sound, source.directory.name)
    worst = ("", 0.0)
    with TensorBytes(source.directory, source.stamps) as files:
        for carried in catalogue.carried:
            comparison.carried(files, carried)
        for weight in catalogue.weights:
            for name, error in comparison.weight(files, weight):
                worst = max(worst, (name, error), key=lambda entry: entry[1])
    return f"largest loss of a weight's energy {worst[1]:.3g}, in {worst[0]}" if worst[0] else "no linear to compare"


class _Comparison:
    def __init__(self, inventory: Inventory, layout: Layout, sound: set[str], source: str) -> None:
        self._inventory = inventory
        self._kinds: Mapping[str, str] = layout.kinds
        self._sound = sound
        self._source = source

    def carried(self, files: TensorBytes, carried: Carried) -> None:
        """A tensor that is no weight; biases of experts stay together where their weights do."""
        whole = carried.info.name in self._inventory.tensors
        name = carried.info.name if whole else carried.name
        if not self._is_there(name):
            return
        expected = np.empty(carried.info.nbytes if whole else carried_bytes(carried), dtype=np.uint8)
        if whole or carried.expert is None:
            files.read_into(carried.info, 0, expected)
        else:
            row = np.empty(carried.info.shape[1], dtype=numpy_dtype(carried.info.dtype))
            files.read_into(carried.info, carried.expert * row.nbytes, row)
            expected = row[carried.start :: carried.step][: carried.count].copy().view(np.uint8)
        self._same_bytes(name, expected.tobytes())

    def weight(self, files: TensorBytes, weight: Weight) -> Iterator[tuple[str, float]]:
        """Full name of each rounded linear to the share of its energy that is lost."""
        if weight.fused is not None and weight.fused in self._inventory.tensors:
            expected = np.empty(weight.matrix.nbytes, dtype=np.uint8)
            index = getattr(weight.matrix, "index", 0)
            files.read_into(weight.matrix.tensors[0], index * expected.nbytes, expected)
            whole = self._inventory.read(weight.fused)
            if index >= len(whole) or whole[index].tobytes() != expected.tobytes():
                self._report(weight.fused)
            return
        reader = weight.matrix.open(files, _ROWS)
        for linear in weight.linears:
            values = self._read(reader.read, linear, weight.columns)
            kind = self._kinds.get(linear.name)
            if kind in (None, "FLOAT"):
                if self._is_there(f"{linear.name}.weight"):
                    expected_bytes = values.astype(numpy_dtype(weight.matrix.float_dtype)).tobytes()
                    self._same_bytes(f"{linear.name}.weight", expected_bytes)
            elif self._is_whole(linear, weight.columns):
                restored = restored_weight(self._inventory, linear.name, weight.columns)
                limits = LIMITS[f"W{linear_bits(self._inventory, linear.name, weight.columns)}"]
                yield linear.name, judge_weight(self._inventory, linear.name, restored, values, limits, self._source)

    @staticmethod
    def _read(read: Callable[[int, Float32], None], linear: LinearRows, columns: int) -> Float32:
        values = np.empty((linear.rows, columns), dtype=np.float32)
        for start in range(0, linear.rows, _ROWS):
            block = values[start : start + _ROWS]
            read(linear.start + start, block)
        return values

    def _is_whole(self, linear: LinearRows, columns: int) -> bool:
        """Whether codes and scales are sound, and of the source's shape; what is not is told of."""
        codes = next((name for name in code_tensors(linear.name) if name in self._inventory.tensors), None)
        if codes is None:
            return self._is_there(f"{linear.name}.weight")
        if not self._sound.issuperset((codes, f"{linear.name}.weight_scale")):
            return False  # the rules on tensors tell of it
        if not has_shape(self._inventory, linear.name, linear.rows, columns):
            shape, wanted = self._inventory.tensors[codes].shape, f"{(linear.rows, columns)} of {self._source}, rounded"
            self._inventory.report_tensor(codes, "source-weight", f"shape {shape}", wanted)
            return False
        return True

    def _is_there(self, name: str) -> bool:
        if name in self._inventory.tensors:
            return True
        wanted = f"the tensor of {self._source}, or its rounding"
        self._inventory.report("model.safetensors.index.json", "source-tensor", "no such tensor", wanted, name)
        return False

    def _same_bytes(self, name: str, expected: bytes) -> None:
        if self._inventory.read(name).tobytes() != expected:
            self._report(name)

    def _report(self, name: str) -> None:
        self._inventory.report_tensor(name, "source-tensor", "other values", f"those of {self._source}")
