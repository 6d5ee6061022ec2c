"""Notes on activations: float16 that overflows, static steps that one value makes too wide."""

from __future__ import annotations

import numpy as np
import pytest
from observed import statistics_of

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLinear
from gs_dist.solvers.gates import dead_input_notes, lost_channels_notes, overflow_notes
from gs_dist.solvers.rescaling import Rescaling


def tokens(outlier: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
    if outlier:
        values[9, 3] = outlier
    return values


def static(scale: float | None) -> QuantizedLinear:
    codes = np.zeros((4, 16), np.int8)
    policy = QuantPolicy(weight_quant_dtype="int8")
    return QuantizedLinear(policy=policy, codes=codes, scale=np.ones((4, 1), np.float32), input_scale=scale)


@pytest.mark.parametrize("outlier", [7e4, -7e4])
def test_an_activation_beyond_float16_is_named_with_its_size(outlier: float) -> None:
    """A float16 checkpoint whose activation a server would make infinite is told so; others are not."""
    seen = statistics_of(tokens(outlier))
    (note,) = overflow_notes(seen, "float16")
    assert "7e+04" in note
    assert "bfloat16" in note
    assert overflow_notes(seen, "bfloat16") == overflow_notes(seen, "float32") == ()
    assert overflow_notes(statistics_of(tokens(65504.0)), "float16") == ()


def test_one_huge_outlier_that_flattens_everything_else_is_named() -> None:
    """With a step made for one value, the channels that it rounds to zero are counted, and the value is named."""
    seen = statistics_of(tokens(1e4))
    (note,) = lost_channels_notes(seen, Rescaling(), static(1e4 / 127.5))
    assert note.startswith("94% of the input's channels")
    assert "1e+04" in note
    assert "channel 3" in note


def test_ordinary_ranges_get_no_note() -> None:
    """A step that fits the values, a weight-only linear, and an outlier that a rescaling takes away are fine."""
    assert lost_channels_notes(statistics_of(tokens()), Rescaling(), static(4 / 127.5)) == ()
    assert lost_channels_notes(statistics_of(tokens(1e4)), Rescaling(), static(None)) == ()
    scale = np.ones(16, np.float32)
    scale[3] = 5e3
    assert lost_channels_notes(statistics_of(tokens(1e4)), Rescaling(scale=scale), static(4 / 127.5)) == ()


def test_a_dead_input_is_named_as_one() -> None:
    """No sample can be left out to mend an input that was zero in all of them; a makeshift step is called that."""
    dead = statistics_of(np.zeros((256, 16), np.float32))
    assert lost_channels_notes(dead, Rescaling(), static(2.0**-23)) == ()
    (note,) = dead_input_notes(dead, static(2.0**-23))
    assert note.startswith("the input was zero in every calibration token, so no error can be told")
    assert "the step 1.19e-07 is a makeshift" in note
    assert "leave out" not in note
    (weights_alone,) = dead_input_notes(dead, static(None))
    assert "step" not in weights_alone
    assert dead_input_notes(statistics_of(tokens()), static(1.0)) == ()
