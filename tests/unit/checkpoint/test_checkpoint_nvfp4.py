"""NVFP4 in compressed-tensors: its bytes are read as the library reads them, and written so that it reads ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gs_dist.checkpoint.dialects.compressed_tensors.layout import FLOAT_FORMATS
from gs_dist.checkpoint.dialects.compressed_tensors.packed_floats import PACKED_FLOATS
from gs_dist.checkpoint.header import DTYPES, SPELLINGS, read_header
from gs_dist.numbers.nvfp4 import NVFP4
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLinear
from gs_dist.solvers.affine import quantize_weight

FORM = PACKED_FLOATS["nvfp4"]
POLICY = QuantPolicy(weight_quant_dtype="nvfp4", weight_quant_granularity="per_group", group_size=16)


def shipped() -> dict[str, Any]:
    """Of `tests/data/make_nvfp4.py`."""
    path = Path(__file__).parents[2] / "data" / "nvfp4.safetensors"
    headers, _ = read_header(path, path.name)
    found = {}
    for name, info in headers.items():
        dtype = DTYPES[SPELLINGS[info.dtype]]
        flat = np.fromfile(path, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=info.offset)
        found[name] = flat.reshape(info.shape)
    return found


def solved(weight: npt.NDArray[np.float32]) -> QuantizedLinear:
    codes, scale, _ = quantize_weight(weight, form=NVFP4, group_size=16, symmetric=True, scale_dtype="bfloat16")
    return QuantizedLinear(policy=POLICY, codes=codes, scale=scale)


def test_what_compressed_tensors_packed_is_read_as_it_reads_it() -> None:
    """Writer and checker, each by itself, give the weight that the library gives, which it rounds to bfloat16."""
    parts = shipped()
    expected = parts.pop("restored")
    inventory: Any = SimpleNamespace(read=lambda name: parts[name.rpartition(".")[2]])
    for values in (FORM.decode(parts).dequantized(), FLOAT_FORMATS[FORM.format].values(inventory, "linear")):
        np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16), expected)


@given(arrays(np.float32, (2, 32), elements=st.floats(-4, 4, width=32)), st.integers(-100, 100))
def test_a_weight_comes_back_as_it_was_solved(weight: npt.NDArray[np.float32], exponent: int) -> None:
    """At any magnitude; blocks that are some tens of thousands of times smaller than the largest are rounded anew."""
    linear = solved(np.ldexp(weight, exponent))
    parts = FORM.encode(linear, float(linear.scale.max()))
    assert {name: (array.dtype.name, array.shape) for name, array in parts.items()} == {
        name: (stored.dtype, stored.shape) for name, stored in FORM.tensors(2, 32).items()
    }
    found = FORM.decode(parts)
    large = linear.scale > linear.scale.max() * 2.0**-13
    np.testing.assert_array_equal(found.scale[large], linear.scale[large])
    blocks = (found.dequantized() - linear.dequantized()).reshape(2, 2, 16)
    assert not blocks[large].any()
    assert (np.abs(blocks) <= 2 * found.scale[:, :, None]).all()


def test_linears_that_engines_fuse_share_the_tensor_scale() -> None:
    """Of two weights a hundred times apart each comes back, with the scale of the larger."""
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    small, large = solved(weight), solved(100 * weight)
    both = [FORM.encode(linear, float(large.scale.max())) for linear in (small, large)]
    assert both[0]["weight_global_scale"] == both[1]["weight_global_scale"]
    for linear, parts in zip((small, large), both, strict=True):
        np.testing.assert_array_equal(FORM.decode(parts).dequantized(), linear.dequantized())


@pytest.mark.interop
def test_compressed_tensors_reads_ours() -> None:
    """Its own decompressor turns a linear back into the weight that was solved."""
    torch = pytest.importorskip("torch", reason="needs the [interop] extra")
    pytest.importorskip("compressed_tensors", reason="needs the [interop] extra")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    linear = solved(np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32))
    parts = FORM.encode(linear, float(linear.scale.max()))
    stored = {
        "weight_packed": torch.from_numpy(parts["weight_packed"]),
        "weight_scale": torch.from_numpy(parts["weight_scale"].view(np.uint8)).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.from_numpy(parts["weight_global_scale"]),
    }
    scheme = QuantizationScheme(targets=["Linear"], **FORM.scheme())
    found = BaseCompressor.get_value_from_registry(FORM.format).decompress(stored, scheme)["weight"]
    np.testing.assert_array_equal(found.float().numpy(), linear.dequantized())
