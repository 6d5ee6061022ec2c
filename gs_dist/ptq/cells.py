"""Cells that take the place of a network's linears: fake-quantised ones to look at, int8 ones to deploy.

Both compute alike: divide outlier channels away if the algorithm found a scale for them, round the
activation if it is to be int8, multiply with the rounded weight. `FakeQuantDense` holds that weight in
floating point, `QuantDense` holds its codes and scales and turns them back on the fly, so that the two
give the same output bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import mint, nn, ops

from gs_dist.numbers.groups import num_groups
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.numbers.scales import EPSILON
from gs_dist.ptq.int8_matmul import int8_kernel, scale_bits, written_out
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.integers import pack_int4
from gs_dist.results.quantized import QuantizedLinear

__all__ = ["FakeQuantDense", "LinearForm", "QuantDense", "linear_form", "token_scale"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """What the cell of a linear looks like from outside.

    Attributes:
        name: full dotted name of the cell.
        out_features, in_features: shape of its weight.
        bias: whether it has one.
        dtype: MindSpore dtype of its weight, and of the outputs of what replaces it.
        activation: cell or primitive applied to the output, or None.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    dtype: Any
    activation: Any


def linear_form(name: str, cell: Any) -> LinearForm:
    """The form of an `nn.Dense` or `mint.nn.Linear`."""
    rows, columns = cell.weight.shape
    return LinearForm(
        name=name,
        out_features=rows,
        in_features=columns,
        bias=cell.bias is not None,
        dtype=cell.weight.dtype,
        activation=getattr(cell, "activation", None),
    )


class _QuantizedLinear(nn.Cell):
    """Everything but the weight: the activation's way in, and the bias and activation function behind."""

    def __init__(self, form: LinearForm, policy: QuantPolicy, strategy: str) -> None:
        # Parameters are named in full; a prefix would also rename those the activation shares with the caller.
        super().__init__(auto_prefix=False)
        self.form = form
        self.policy = policy
        self.strategy = strategy
        # Plain values, settled here: `construct` must compile in graph mode, where a network is exported.
        self.out_dtype = form.dtype
        self.rounds_input = policy.act_quant_dtype is not None
        self.matmul = ops.MatMul(transpose_b=True)
        # A copy of the cell, because a child must not be shared with the caller; its parameters are the caller's.
        self.activation = _copy_of(form.activation)
        # NaN until parameters come: a network whose checkpoint was never loaded shows it at once.
        ones, zeros = np.full(form.in_features, np.nan, np.float32), np.zeros(form.in_features, np.float32)
        smooths, shifts = policy.suppression.rescales, policy.suppression.shifts
        self.smooth_scale = self._parameter("smooth_scale", ones) if smooths else None
        self.smooth_shift = self._parameter("smooth_shift", zeros) if shifts else None
        static = policy.is_static
        self.input_scale = self._parameter("input_scale", np.full(1, np.nan, np.float32)) if static else None
        offset = static and not policy.act_symmetric
        self.input_offset = self._parameter("input_offset", np.zeros(1, np.int8)) if offset else None
        has_bias = form.bias or shifts
        self.bias = self._parameter("bias", np.zeros(form.out_features, np.float32), form.dtype) if has_bias else None

    def _parameter(self, name: str, value: Array, dtype: Any = None) -> Any:
        full_name = f"{self.form.name}.{name}" if self.form.name else name
        tensor = ms.Tensor(value) if dtype is None else ms.Tensor(value).astype(dtype)
        return ms.Parameter(tensor, name=full_name, requires_grad=False)

    def _fill(self, quantized: QuantizedLinear) -> None:
        form = self.form
        if self.smooth_scale is not None:
            scale = quantized.smooth_scale
            self.smooth_scale.set_data(ms.Tensor(np.ones(form.in_features, np.float32) if scale is None else scale))
        if self.smooth_shift is not None and quantized.smooth_shift is not None:
            self.smooth_shift.set_data(ms.Tensor(quantized.smooth_shift))
        if self.input_scale is not None:
            assert quantized.input_scale is not None, f"{form.name}: solved without a scale for its static input"
            self.input_scale.set_data(ms.Tensor(np.array([quantized.input_scale], np.float32)))
        if self.input_offset is not None:
            self.input_offset.set_data(ms.Tensor(np.array([quantized.input_zero_point or 0], np.int8)))
        if self.bias is not None and quantized.bias is not None:
            self.bias.set_data(ms.Tensor(quantized.bias.astype(np.float32)).astype(form.dtype))

    def smoothed_input(self, x: Any) -> Any:
        """The activation (..., in) after the outlier suppression that nothing before the linear does."""
        if self.smooth_scale is None:
            return x
        x = x.astype(ms.float32)
        if self.smooth_shift is not None:
            x = x - self.smooth_shift
        return x / self.smooth_scale

    def input_codes(self, x: Any) -> tuple[Any, Any, Any]:
        """Codes (..., in) of a smoothed activation as float32, their scale and zero point (None when symmetric)."""
        x = x.astype(ms.float32)
        scale, offset = self.input_scale, None
        if scale is None:
            scale = token_scale(x)
        codes = x / scale
        if self.input_offset is not None:
            offset = self.input_offset.astype(ms.float32)
            codes = codes + offset
        return mint.clamp(mint.round(codes), -128.0, 127.0), scale, offset

    def rounded_input(self, x: Any) -> Any:
        """The activation (..., in) as the weight meets it: smoothed, rounded to int8 and back."""
        x = self.smoothed_input(x)
        if self.rounds_input:
            codes, scale, offset = self.input_codes(x)
            x = (codes if offset is None else codes - offset) * scale
        return x.astype(self.out_dtype)

    def float_weight(self) -> Any:
        """The rounded weight (out, in) in the linear's dtype."""
        raise NotImplementedError

    def product(self, x: Any) -> Any:
        """Rounded input times rounded weight, (tokens, out) for x (tokens, in)."""
        return self.matmul(self.rounded_input(x), self.float_weight())

    def construct(self, x: Any) -> Any:
        """Output (..., out) of the quantised linear for x (..., in)."""
        shape = x.shape
        y = self.product(x.reshape(-1, shape[-1]))
        if self.bias is not None:
            y = y + self.bias
        if self.activation is not None:
            y = self.activation(y)
        return y.reshape((*shape[:-1], y.shape[-1]))

    def extend_repr(self) -> str:
        """Shape and strategy, for printing a network."""
        return f"in_features={self.form.in_features}, out_features={self.form.out_features}, {self.strategy}"


class FakeQuantDense(_QuantizedLinear):
    """A linear with rounded weights kept in floating point.

    Args:
        form: of the linear it replaces.
        strategy: as the summary shows it.
        quantised: what the solver found.
    """

    def __init__(self, form: LinearForm, strategy: str, quantized: QuantizedLinear) -> None:
        super().__init__(form, quantized.policy, strategy)
        self.quantized = quantized
        self._fill(quantized)
        self.weight = self._parameter("weight", quantized.dequantized(), form.dtype)

    def float_weight(self) -> Any:
        """The rounded weight (out, in) in the linear's dtype."""
        return self.weight

    def converted(self) -> QuantDense:
        """The same linear holding integers."""
        cell = QuantDense(self.form, self.quantized.policy, self.strategy)
        cell.fill(self.quantized)
        return cell


class QuantDense(_QuantizedLinear):
    """A linear that holds integer codes and scales.

    Parameters, by name within the cell:
        weight: codes; int8 (out, in), or for int4 int8 (in, out / 2) with the even output channel in the
            low nibble, as Golden Stick packs them (unpacked where the output channels are odd).
        weight_scale: (out, groups) float32.
        weight_offset: (out, groups) int8, asymmetric weights only.
        group_index: (in,) int32, the group of each column, GPTQ with `desc_act` and moving groups only.
        input_scale, input_offset: (1,) float32 and int8, static activations only.
        smooth_scale, smooth_shift: (in,) float32, x becomes (x - smooth_shift) / smooth_scale.
        deq_scale: (out,) int64, static activations of float16 linears only: the bits of
            float32(input_scale * weight_scale), as the card's kernel reads them.
        bias: (out,).

    A fresh one holds NaN scales and waits for `fill` or a checkpoint.
    """

    def __init__(self, form: LinearForm, policy: QuantPolicy, strategy: str) -> None:
        super().__init__(form, policy, strategy)
        rows, columns = form.out_features, form.in_features
        groups = num_groups(columns, policy.group_size)
        self.packed = policy.weight_format is INT4 and rows % 2 == 0
        codes = np.zeros((columns, rows // 2) if self.packed else (rows, columns), np.int8)
        self.weight = self._parameter("weight", codes)
        self.weight_scale = self._parameter("weight_scale", np.full((rows, groups), np.nan, np.float32))
        offset = np.zeros((rows, groups), np.int8)
        self.weight_offset = None if policy.weight_symmetric else self._parameter("weight_offset", offset)
        moves = policy.column_order == "group"
        self.group_index = self._parameter("group_index", np.zeros(columns, np.int32)) if moves else None
        w8a8 = self.rounds_input and policy.weight_format is INT8 and policy.weight_symmetric
        self.kernel = int8_kernel(form.dtype) if w8a8 else None
        # Stored rather than computed, because graph mode cannot look at the bits of a float.
        has_bits = w8a8 and policy.is_static and form.dtype == ms.float16
        nan = scale_bits(np.full(rows, np.nan, np.float32))
        self.deq_scale = self._parameter("deq_scale", nan) if has_bits else None

    def fill(self, quantized: QuantizedLinear) -> None:
        """Takes over what a solver found."""
        self._fill(quantized)
        codes = pack_int4(quantized.codes) if self.packed else quantized.codes
        self.weight.set_data(ms.Tensor(codes))
        self.weight_scale.set_data(ms.Tensor(quantized.scale))
        if self.deq_scale is not None:
            product = np.float32(quantized.input_scale) * quantized.scale.reshape(-1)
            self.deq_scale.set_data(ms.Tensor(scale_bits(product)))
        if self.weight_offset is not None and quantized.zero_point is not None:
            self.weight_offset.set_data(ms.Tensor(quantized.zero_point))
        if self.group_index is not None:
            index = quantized.group_index
            groups = quantized.scale.shape[1]
            if index is None:
                index = np.repeat(np.arange(groups, dtype=np.int32), self.form.in_features // groups)
            self.group_index.set_data(ms.Tensor(index))

    def float_weight(self) -> Any:
        """The weight (out, in) the integers stand for, in the linear's dtype."""
        codes = self.weight.astype(ms.float32)
        if self.packed:
            codes = _unpack(codes)
        if self.group_index is not None:
            scale = ops.gather(self.weight_scale, self.group_index, 1)
            if self.weight_offset is not None:
                codes = codes - ops.gather(self.weight_offset.astype(ms.float32), self.group_index, 1)
            return (codes * scale).astype(self.out_dtype)
        rows, groups = self.weight_scale.shape
        grouped = codes.reshape(rows, groups, -1)
        if self.weight_offset is not None:
            grouped = grouped - self.weight_offset.astype(ms.float32).reshape(rows, groups, 1)
        grouped = grouped * self.weight_scale.reshape(rows, groups, 1)
        return grouped.reshape(rows, -1).astype(self.out_dtype)

    def product(self, x: Any) -> Any:
        """Rounded input times rounded weight, by int8 products where the device has them."""
        if self.kernel is not None:
            return self.integer_product(x)
        return self.matmul(self.rounded_input(x), self.float_weight())

    def integer_product(self, x: Any) -> Any:
        """The same product of W8A8 without turning codes back: x (tokens, in) to (tokens, out).

        With codes q of scale s and zero point z, and weight codes w of scale t,
        sum((q - z) s w t) = (sum(q w) - z sum(w)) s t.
        """
        codes, scale, offset = self.input_codes(self.smoothed_input(x))
        weight_scale = self.weight_scale.reshape(-1)
        correction = None
        if offset is not None:
            sums = self.weight.astype(ms.float32).sum(1)  # exact: |sum| < 2^24 up to 131072 columns
            correction = (-sums * offset).astype(ms.int32)
        per_token = None
        if self.input_scale is not None:
            weight_scale = weight_scale * scale
        else:
            per_token = scale.reshape(-1)
        integers = codes.astype(ms.int8)
        if self.kernel is None:
            return written_out(integers, self.weight, weight_scale, correction, per_token, self.out_dtype)
        if self.deq_scale is not None:
            weight_scale = self.deq_scale
        return self.kernel(integers, self.weight, weight_scale, None, correction, per_token)


def _copy_of(activation: Any) -> Any:
    if not isinstance(activation, nn.Cell):
        return activation
    return copy.deepcopy(activation, {id(parameter): parameter for parameter in activation.get_parameters()})


def token_scale(x: Any) -> Any:
    """Scale absmax/127.5 of each token of x (..., channels) float32, `EPSILON` for one of zeros."""
    largest = mint.amax(mint.abs(x), -1, True)
    return largest / 127.5 + (largest == 0).astype(ms.float32) * EPSILON


def _unpack(packed: Any) -> Any:
    """Bytes (in, out / 2) as float32 to codes (out, in): low nibble the even output channel, high the odd."""
    high = mint.floor(packed / 16.0)
    low = packed - high * 16.0
    low = mint.where(low >= 8.0, low - 16.0, low)
    columns, pairs = packed.shape
    return ops.stack([low.T, high.T], 1).reshape(2 * pairs, columns)
