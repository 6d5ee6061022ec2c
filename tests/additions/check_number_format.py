"""Run with a package that holds integers of six bits: they are taken up everywhere from their own file."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from gs_dist.checkpoint.dialects import check_policies
from gs_dist.errors import RecipeError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.keys import recipe_keys
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.solvers.objective import GramObjective
from gs_dist.solvers.rounding import round_weight

policy = QuantPolicy(weight_quant_dtype="int6")
assert "int6" in {key.path: key for key in recipe_keys(CalibrationConfig)}["ptq.weight_quant_dtype"].values
with pytest.raises(ValidationError, match="set group_size: 64"):
    QuantPolicy(weight_quant_dtype="int6", weight_quant_granularity="per_group", group_size=128)

# Sizes, rounding by every method, labels.
assert stored_bytes(policy, (8, 64), "float32") == 8 * 64 * 6 // 8 + 8 * 4
rng = np.random.default_rng(0)
weight, x = rng.normal(size=(8, 64)).astype(np.float32), rng.normal(size=(256, 64)).astype(np.float32)
for recovery in ("none", "gptq", "coordinate-descent"):
    grouped = {"weight_quant_granularity": "per_group", "group_size": 64, "weight_clip": True}
    for changes in ({}, grouped, {"weight_symmetric": False}):
        used = QuantPolicy(weight_quant_dtype="int6", precision_recovery=recovery, **changes)
        solved, _ = round_weight(weight, used, GramObjective(x.T @ x), "float32")
        assert -32 <= solved.codes.min() < -20
        assert 20 < solved.codes.max() <= 31
        assert np.abs(solved.dequantized() - weight).max() < 0.6
        assert "W6-" in used.label

# A dialect that has no place for them says so.
for dialect in ("compressed-tensors", "ascend", "golden-stick"):
    with pytest.raises(RecipeError, match="cannot hold int6 weights: set weight_quant_dtype to one of int8, qint4x2"):
        check_policies(dialect, {"model.layers.0.mlp.up_proj": policy}, None)  # refused before anything is looked at
print("taken up")
