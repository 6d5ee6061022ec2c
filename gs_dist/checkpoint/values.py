"""Rules on the numbers in a model directory, read a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.finite import not_finite
from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import STATIC_KINDS, Expectation, Layout
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["check_static_linears", "check_tensors"]

Array = npt.NDArray[Any]

_OUTLIER = 300  # times the median scale, from which a scale is told of
_CLOSE = 0.02  # relative; scales may have been rounded to bfloat16 on the way, twice
_SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def check_tensors(inventory: Inventory, layout: Layout, *, values: bool = True) -> set[str]:
    """Compares tensors with the layout: present, dtype, shape, values; returns the names that passed.

    Values are looked at only where dtype and shape are right, and not at all without `values`.
    """
    sound = set()
    sources = "the description" if DIALECTS[layout.dialect].description_file else "config.json"
    for name, expected in layout.tensors.items():
        info = inventory.tensors.get(name)
        if info is None:
            if not expected.optional:
                file = _likely_file(inventory, name)
                inventory.report(file, "tensor-present", "no such tensor", f"{_form(expected)} by {sources}", name)
        elif info.dtype not in expected.dtypes:
            inventory.report_tensor(name, "tensor-dtype", info.dtype, " or ".join(expected.dtypes))
        elif info.shape != expected.shape:
            inventory.report_tensor(name, "tensor-shape", info.shape, expected.shape)
        elif not values or _check_values(inventory, name, expected):
            sound.add(name)
    for name in inventory.tensors:
        if name not in layout.tensors and not name.endswith("rotary_emb.inv_freq"):
            inventory.report_tensor(name, "tensor-expected", "a tensor nothing calls for", f"none, by {sources}")
    return sound


def _form(expected: Expectation) -> str:
    return f"{' or '.join(expected.dtypes)} {expected.shape}"


def _likely_file(inventory: Inventory, name: str) -> str:
    """The file that holds most of what stands beside a missing tensor."""
    prefix = name.rpartition(".")[0]
    while prefix:
        near = [info.file for other, info in inventory.tensors.items() if other.startswith(prefix + ".")]
        if near:
            return max(sorted(set(near)), key=near.count)
        prefix = prefix.rpartition(".")[0]
    return "model.safetensors.index.json"


def _check_values(inventory: Inventory, name: str, expected: Expectation) -> bool:
    kind = expected.values.split()[0].rstrip("48")
    rule = _RULES.get(kind)
    if rule is None:
        return True
    found = rule(inventory, name, expected)
    if found is None:
        return True
    inventory.report_tensor(name, *found)
    return False


Finding = tuple[str, str, str] | None
"""Rule, what was found, what was expected."""


def _position(flat: int, shape: tuple[int, ...]) -> str:
    return str(tuple(int(i) for i in np.unravel_index(flat, shape))) if shape else "()"


def _finite(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    seen = 0
    for block in inventory.chunks(name):
        bad = not_finite(block)
        if bad.any():
            first = int(np.argmax(bad))
            where = _position(seen + first, expected.shape)
            return "value-finite", f"{block.reshape(-1)[first]} at {where}", "finite values"
        seen += block.size
    return None


def _scale(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    finding = _finite(inventory, name, expected)
    if finding is not None:
        return finding
    seen = 0
    for block in inventory.chunks(name):
        bad = block.astype(np.float32) <= 0
        if bad.any():
            first = int(np.argmax(bad))
            where = _position(seen + first, expected.shape)
            return "scale-positive", f"{block.reshape(-1)[first]} at {where}", "scales above 0"
        seen += block.size
    _note_outlier(inventory, name, expected)
    return None


def _note_outlier(inventory: Inventory, name: str, expected: Expectation) -> None:
    scales = inventory.read(name).astype(np.float32).reshape(-1)
    median = float(np.median(scales)) if scales.size else 0.0
    if scales.size > 1 and scales.max() > _OUTLIER * median:
        first = int(np.argmax(scales))
        inventory.note(
            "scale-outlier",
            f"{name}: {scales[first]:.4g} at {_position(first, expected.shape)} is {scales[first] / median:.0f} times "
            "the median of its neighbours",
        )


def _exponent(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    for block in inventory.chunks(name):
        if (block == 255).any():
            return "scale-exponent", "255, which is NaN", "exponents of two plus 127, up to 254"
    return None


def _zero(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    for block in inventory.chunks(name):
        values = block.astype(np.float32)
        if values.any():
            return "offset-zero", f"{values[values != 0][0]:g}", "0: weights and caches are symmetric"
    return None


def _codes(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    """Codes of `limit` bits, two's complement, in int8."""
    top = 1 << (expected.limit - 1)
    largest = 0
    for block in inventory.chunks(name):
        if block.min() < -top or block.max() >= top:
            return "code-range", f"{block.min()} to {block.max()}", f"{expected.limit} bits: {-top} to {top - 1}"
        largest = max(largest, int(block.max()), -int(block.min()))
    if not largest:
        inventory.note("weight-zero", f"{name}: every code is 0, so that the linear gives nothing but its bias")
    elif expected.limit == 8 and largest < 16:
        return "code-range", f"no code beyond {largest}", "8 bits: ranges reach the largest weight of each channel"
    return None


def _offset(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    for block in inventory.chunks(name):
        values = block.astype(np.float64)
        bad = ~((values >= -128) & (values <= 127) & (values == np.rint(values)))
        if bad.any():
            return "offset-range", f"{values[bad][0]:g}", "whole numbers within [-128, 127]: engines cast to int8"
    return None


def _bits(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    words = inventory.read(name)
    if ((words < 0) | (words >= 2**32)).any():
        return "deq-scale-bits", "a word with its high half set", "the bits of a float32 in the low half"
    floats = words.astype(np.uint32).view(np.float32)
    if not (np.isfinite(floats).all() and (floats > 0).all()):
        return "deq-scale-bits", f"bits of {floats.min():g} to {floats.max():g}", "bits of finite float32 above 0"
    return None


def _shape(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    stored, wanted = inventory.read(name).tolist(), [int(n) for n in expected.values.split()[1:]]
    return None if stored == wanted else ("weight-shape", str(stored), str(wanted))


def _group_index(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    index = inventory.read(name)
    if index.min() < 0 or index.max() >= expected.limit:
        return "group-index", f"{index.min()} to {index.max()}", f"groups 0 to {expected.limit - 1}"
    return None


def _padding(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    bits = int(expected.values[-1])
    used = expected.limit * bits % 32
    if not used:
        return None
    for block in inventory.chunks(name):
        if (block[:, -1].view(np.uint32) >> used).any():
            return "packing-padding", "bits set after the last value of a row", "zero bits"
    return None


def _tied(inventory: Inventory, name: str, expected: Expectation) -> Finding:
    embedding = inventory.tensors.get("model.embed_tokens.weight")
    own = inventory.tensors[name]
    if embedding is None or (embedding.dtype, embedding.shape) != (own.dtype, own.shape):
        return "tied-weights", "another form than the embedding's", "no tensor, or a copy of model.embed_tokens.weight"
    blocks = zip(inventory.chunks(name), inventory.chunks(embedding.name), strict=True)
    if any(mine.tobytes() != theirs.tobytes() for mine, theirs in blocks):
        return "tied-weights", "other values than the embedding's", "no tensor, or a copy of model.embed_tokens.weight"
    return None


_RULES: Mapping[str, Callable[[Inventory, str, Expectation], Finding]] = {
    "float": _finite,
    "scale": _scale,
    "exponent": _exponent,
    "zero": _zero,
    "codes": _codes,
    "offset": _offset,
    "bits": _bits,
    "shape": _shape,
    "group-index": _group_index,
    "padding": _padding,
    "tied": _tied,
}


def check_static_linears(inventory: Inventory, layout: Layout, sound: set[str], *, folds_bias: bool) -> None:
    """Rules between the tensors of W8A8 linears of dialects that store what an engine's kernel takes.

    deq_scale is input_scale x weight_scale. quant_bias is round(bias / deq_scale - sum of offset x weight)
    over the input channels, with bias where the dialect folds it in (`folds_bias`) and without elsewhere. Linears
    that engines fuse share input scale and offset.
    """
    for name, kind in layout.kinds.items():
        leaves = [f"{name}.{leaf}" for leaf in ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")]
        if kind not in STATIC_KINDS or not sound.issuperset(leaves):
            continue
        deq_scale = _deq_scale(inventory, name)
        scale = inventory.read(name + ".input_scale").astype(np.float64)
        weight_scale = name + ".weight_scale"
        if weight_scale in sound and np.ptp(scale) == 0:  # a scale a channel has smoothing in it
            product = scale[0] * inventory.read(weight_scale).astype(np.float64).reshape(-1)
            _compare(inventory, name + ".deq_scale", "deq-scale", deq_scale, product, _CLOSE * product)
        _check_quant_bias(inventory, layout, name, deq_scale, sound, folds_bias=folds_bias)
    _check_shared_inputs(inventory, layout, sound)


def _deq_scale(inventory: Inventory, name: str) -> Array:
    stored = inventory.read(name + ".deq_scale")
    if stored.dtype == np.int64:
        stored = stored.astype(np.uint32).view(np.float32)
    return np.asarray(stored.astype(np.float64))


def _check_quant_bias(
    inventory: Inventory, layout: Layout, name: str, deq_scale: Array, sound: set[str], *, folds_bias: bool
) -> None:
    expected = -_offset_sums(inventory, name)
    slack = 1.0 + _CLOSE * np.abs(expected)
    if folds_bias and name + ".bias" in layout.tensors:
        if name + ".bias" not in sound:
            return
        folded = inventory.read(name + ".bias").astype(np.float64) / deq_scale
        expected, slack = expected + folded, slack + _CLOSE * np.abs(folded)
    found = inventory.read(name + ".quant_bias").astype(np.float64)
    _compare(inventory, name + ".quant_bias", "quant-bias", found, expected, slack)


def _offset_sums(inventory: Inventory, name: str) -> Array:
    """Sum over input channels of offset x weight code, (out,) float64; weights are read only where it is not 0."""
    offset = inventory.read(name + ".input_offset").astype(np.float64)
    rows = inventory.tensors[name + ".weight"].shape[0]
    if not offset.any():
        return np.zeros(rows)
    if np.ptp(offset) == 0:
        sums = [block.sum(axis=1, dtype=np.int64) for block in inventory.chunks(name + ".weight")]
        return np.asarray(offset[0] * np.concatenate(sums))
    return np.concatenate([block.astype(np.float64) @ offset for block in inventory.chunks(name + ".weight")])


def _compare(inventory: Inventory, name: str, rule: str, found: Array, expected: Array, slack: Array) -> None:
    wrong = np.abs(found - expected) > slack
    if wrong.any():
        first = int(np.argmax(wrong))
        text = f"{found[first]:.6g} in channel {first} ({int(wrong.sum())} of {wrong.size} are wrong)"
        inventory.report_tensor(name, rule, text, f"{expected[first]:.6g}")


def _check_shared_inputs(inventory: Inventory, layout: Layout, sound: set[str]) -> None:
    prefixes = sorted({".".join(name.split(".")[:3]) for name in layout.kinds}, key=lambda p: (len(p), p))
    for prefix in prefixes:
        for members in _SHARED_INPUTS:
            for leaf in ("input_scale", "input_offset"):
                names = [f"{prefix}.{member}.{leaf}" for member in members]
                if not sound.issuperset(names):
                    continue
                first, *others = (inventory.read(name) for name in names)
                for name, other in zip(names[1:], others, strict=True):
                    if not np.array_equal(first, other):
                        found = f"{float(other.reshape(-1)[0]):.6g}"
                        wanted = f"{float(first.reshape(-1)[0]):.6g} as {members[0]}, with which engines fuse it"
                        inventory.report_tensor(name, "shared-input", found, wanted)
