from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from fake_rounding import fake_quantize_per_token, fake_quantize_static
from mindspore import mint, nn
from ptq_networks import random_dense

from gs_dist.numbers.integer import INT8
from gs_dist.ptq.cells import FakeQuantDense, QuantDense, linear_form
from gs_dist.ptq.int8_matmul import written_out
from gs_dist.recipe.policy import AlgoArgs, PrecisionRecovery, QuantPolicy
from gs_dist.results.quantized import QuantizedLinear

ROWS, COLUMNS = 6, 128


def random_quantized(policy: QuantPolicy, rows: int = ROWS, seed: int = 0) -> QuantizedLinear:
    """Codes over the whole range with scales that differ by group."""
    rng = np.random.default_rng(seed)
    groups = COLUMNS // policy.group_size if policy.group_size else 1
    low, high = (-128, 128) if policy.weight_format is INT8 else (-8, 8)
    moving = policy.precision_recovery is PrecisionRecovery.GPTQ
    index = rng.permutation(np.repeat(np.arange(groups, dtype=np.int32), COLUMNS // groups))
    zero = None if policy.weight_symmetric else rng.integers(low, high, (rows, groups)).astype(np.int8)
    return QuantizedLinear(
        policy=policy,
        codes=rng.integers(low, high, (rows, COLUMNS)).astype(np.int8),
        scale=rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float32),
        zero_point=zero,
        group_index=index if moving else None,
        bias=rng.standard_normal(rows).astype(np.float32),
        input_scale=0.03 if policy.is_static else None,
        input_zero_point=-7 if policy.is_static and not policy.act_symmetric else None,
    )


POLICIES = {
    "int8": QuantPolicy(),
    "int8 asymmetric": QuantPolicy(weight_symmetric=False),
    "int8 static": QuantPolicy(act_quant_dtype="int8", act_symmetric=False),
    "int8 static symmetric": QuantPolicy(act_quant_dtype="int8"),
    "int8 dynamic": QuantPolicy(act_quant_dtype="int8", act_quant_granularity="per_token"),
    "int4": QuantPolicy(weight_quant_dtype="qint4x2"),
    "int4 groups": QuantPolicy(
        weight_quant_dtype="qint4x2", weight_quant_granularity="per_group", group_size=64, weight_symmetric=False
    ),
    "int4 moving groups": QuantPolicy(
        weight_quant_dtype="qint4x2",
        weight_quant_granularity="per_group",
        group_size=64,
        weight_symmetric=False,
        precision_recovery=PrecisionRecovery.GPTQ,
        algo_args=AlgoArgs(desc_act=True),
    ),
}


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_integers_stand_for_the_solvers_weight(policy: QuantPolicy, rows: int):
    """Codes and scales in a cell turn back into exactly the weight the solver meant, odd output channels too."""
    quantized = random_quantized(policy, rows)
    form = linear_form("linear", nn.Dense(COLUMNS, rows))
    fake = FakeQuantDense(form, "W", quantized)
    converted = fake.converted()
    np.testing.assert_array_equal(converted.float_weight().asnumpy(), quantized.dequantized())
    x = ms.Tensor(np.random.default_rng(1).standard_normal((2, 3, COLUMNS)).astype(np.float32))
    np.testing.assert_array_equal(converted(x).asnumpy(), fake(x).asnumpy())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_output_against_numpy(policy: QuantPolicy):
    """A cell's output is the rounded input times the rounded weight plus the bias, computed here in NumPy."""
    quantized = random_quantized(policy)
    cell = FakeQuantDense(linear_form("linear", nn.Dense(COLUMNS, ROWS)), "W", quantized)
    x = np.random.default_rng(1).standard_normal((5, COLUMNS)).astype(np.float32)
    rounded = x
    if policy.is_static:
        rounded = fake_quantize_static(x, quantized.input_scale or 0.0, quantized.input_zero_point)
    elif policy.act_quant_dtype:
        rounded = fake_quantize_per_token(x)
    wanted = rounded.astype(np.float64) @ quantized.dequantized().T.astype(np.float64) + quantized.bias
    np.testing.assert_allclose(cell(ms.Tensor(x)).asnumpy(), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cell.rounded_input(ms.Tensor(x)).asnumpy(), rounded)


def test_smoothing_comes_before_rounding():
    """A cell with an explicit smoothing reads (x - shift) / scale."""
    rng = np.random.default_rng(3)
    scale, shift = rng.uniform(0.5, 2, COLUMNS).astype(np.float32), rng.standard_normal(COLUMNS).astype(np.float32)
    policy = QuantPolicy(act_quant_dtype="int8", outliers_suppression="outlier-suppression+")
    quantized = QuantizedLinear(
        policy=policy,
        codes=np.zeros((ROWS, COLUMNS), np.int8),
        scale=np.ones((ROWS, 1), np.float32),
        input_scale=0.02,
        smooth_scale=scale,
        smooth_shift=shift,
    )
    cell = FakeQuantDense(linear_form("linear", nn.Dense(COLUMNS, ROWS, has_bias=False)), "W", quantized)
    x = rng.standard_normal((4, COLUMNS)).astype(np.float32)
    wanted = fake_quantize_static((x - shift) / scale, 0.02)
    np.testing.assert_array_equal(cell.converted().rounded_input(ms.Tensor(x)).asnumpy(), wanted)


def test_tokens_of_zeros_stay_zero():
    """Per-token rounding leaves a token of zeros alone instead of dividing by zero."""
    x = np.zeros((2, COLUMNS), np.float32)
    x[1] = np.linspace(-2, 127.5, COLUMNS)
    cell = FakeQuantDense(
        linear_form("linear", nn.Dense(COLUMNS, ROWS)), "W", random_quantized(POLICIES["int8 dynamic"])
    )
    np.testing.assert_array_equal(cell.rounded_input(ms.Tensor(x)).asnumpy(), fake_quantize_per_token(x))


@pytest.mark.parametrize("kind", ["int8 static", "int8 static symmetric", "int8 dynamic"])
def test_integer_products_equal_fake_quantization(kind: str):
    """Multiplying codes, as a card does it, gives the output of the rounded numbers but for float32's last digits."""
    cell = FakeQuantDense(
        linear_form("linear", nn.Dense(COLUMNS, ROWS)), "W", random_quantized(POLICIES[kind])
    ).converted()
    x = ms.Tensor(np.random.default_rng(4).standard_normal((9, COLUMNS)).astype(np.float32))
    wanted = cell.product(x).asnumpy()
    np.testing.assert_allclose(cell.integer_product(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [ms.float16, ms.float32])
@pytest.mark.parametrize("kind", ["int8 static", "int8 static symmetric", "int8 dynamic"])
def test_a_kernel_gets_what_it_reads(kind: str, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """A device's kernel is called with codes, corrections and scales; static float16 scales come as bits in int64."""
    shown = []

    def kernel(x, weight, scale, offset, correction, per_token):
        assert (x.dtype, weight.dtype, offset) == (ms.int8, ms.int8, None)
        shown.append(scale.dtype)
        if scale.dtype == ms.int64:
            scale = ms.Tensor(scale.asnumpy().astype(np.uint32).view(np.float32))
        return written_out(x, weight, scale, correction, per_token, dtype)

    monkeypatch.setattr("gs_dist.ptq.cells.int8_kernel", lambda dtype: kernel)
    form = linear_form("linear", nn.Dense(COLUMNS, ROWS, dtype=dtype))
    fake = FakeQuantDense(form, "W", random_quantized(POLICIES[kind]))
    x = ms.Tensor(np.random.default_rng(4).standard_normal((9, COLUMNS)).astype(np.float32)).astype(dtype)
    wanted = fake(x).asnumpy()
    tolerance = 1e-2 if dtype == ms.float16 else 1e-5
    found = fake.converted()(x).asnumpy()
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert shown == [ms.int64 if dtype == ms.float16 and "static" in kind else ms.float32]


@pytest.mark.npu
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("kind", ["int8 static", "int8 static symmetric", "int8 dynamic"])
def test_card_multiplies_codes(kind: str, dtype: Any):
    """On a card the int8 kernel gives what the rounded numbers give, within the output's precision."""
    if not ms.hal.is_available("Ascend"):
        pytest.skip("needs an Ascend card")
    ms.set_device("Ascend")
    form = linear_form("linear", nn.Dense(COLUMNS, ROWS, dtype=dtype))
    fake = FakeQuantDense(form, "W", random_quantized(POLICIES[kind]))
    x = ms.Tensor(np.random.default_rng(4).standard_normal((9, COLUMNS)).astype(np.float32)).astype(dtype)
    wanted = fake(x).astype(ms.float32).asnumpy()
    found = fake.converted()(x).astype(ms.float32).asnumpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("activation", [None, "relu", nn.PReLU()])
def test_activation_function_of_the_linear_stays(activation: Any):
    """An nn.Dense with an activation function keeps it, and its parameters keep their names."""
    dense = random_dense(np.random.default_rng(0), COLUMNS, ROWS, activation=activation)
    network = nn.SequentialCell(dense)
    names = [parameter.name for parameter in network.get_parameters()]
    weight = dense.weight.asnumpy()
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127.5)
    quantized = QuantizedLinear(
        policy=QuantPolicy(),
        codes=np.clip(np.rint(weight / scale), -128, 127).astype(np.int8),
        scale=scale.astype(np.float32),
        bias=dense.bias.asnumpy(),
    )
    cell = FakeQuantDense(linear_form("linear", dense), "W", quantized).converted()
    x = ms.Tensor(np.random.default_rng(1).standard_normal((3, COLUMNS)).astype(np.float32))
    np.testing.assert_allclose(cell(x).asnumpy(), dense(x).asnumpy(), atol=0.05)
    assert [parameter.name for parameter in network.get_parameters()] == names


def test_outputs_have_the_linears_dtype():
    """A float16 linear becomes a cell that takes and gives float16."""
    form = linear_form("linear", nn.Dense(COLUMNS, ROWS, dtype=ms.float16))
    cell = FakeQuantDense(form, "W", random_quantized(POLICIES["int8 static"])).converted()
    x = ms.Tensor(np.ones((2, COLUMNS), np.float16))
    assert cell(x).dtype == ms.float16
    assert cell.weight_scale.dtype == ms.float32


def test_mint_linear_has_a_form_too():
    """mint.nn.Linear is described like nn.Dense."""
    form = linear_form("linear", mint.nn.Linear(COLUMNS, ROWS, bias=False))
    assert (form.out_features, form.in_features, form.bias, form.activation) == (ROWS, COLUMNS, False, None)


def test_placeholders_hold_no_plausible_numbers():
    """A cell without its parameters gives NaN, so that a forgotten checkpoint shows."""
    cell = QuantDense(linear_form("linear", nn.Dense(COLUMNS, ROWS)), POLICIES["int8 static"], "W")
    assert np.isnan(cell(ms.Tensor(np.ones((1, COLUMNS), np.float32))).asnumpy()).all()


def test_parameters_of_a_cell():
    """A cell holds the parameters its scheme needs, under the cell's full name, and no others."""
    cell = QuantDense(linear_form("a.b", nn.Dense(COLUMNS, ROWS)), POLICIES["int4 moving groups"], "W")
    found = {parameter.name: (parameter.shape, parameter.dtype) for parameter in cell.get_parameters()}
    assert found == {
        "a.b.weight": ((COLUMNS, ROWS // 2), ms.int8),
        "a.b.weight_scale": ((ROWS, 2), ms.float32),
        "a.b.weight_offset": ((ROWS, 2), ms.int8),
        "a.b.group_index": ((COLUMNS,), ms.int32),
        "a.b.bias": ((ROWS,), ms.float32),
    }
