"""Run with a package that holds rounding toward zero: it is taken up everywhere from its own two files."""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError

from gs_dist.model.families import read_architecture
from gs_dist.planning.memory import solver_bytes
from gs_dist.planning.solver_operations import solver_operations
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.keys import recipe_keys
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy, required_statistics
from gs_dist.solvers.objective import GramObjective
from gs_dist.solvers.rounding import round_weight

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def refusal(**settings: object) -> str:
    try:
        QuantPolicy(**settings)
    except ValidationError as error:
        return str(error)
    raise AssertionError("taken")


plain = QuantPolicy(precision_recovery="none")
policy = QuantPolicy(precision_recovery="toward-zero", algo_args={"pull": 0.25})

# Policy: its argument is read, another's is not, and what it does not go with is refused in the recipe's words.
assert policy.unread_arguments(AlgoArgs(pull=0.25)) == {}
assert plain.unread_arguments(AlgoArgs(pull=0.25)) == {"pull": "precision_recovery: toward-zero"}
assert "toward-zero takes weights alone: set act_quant_dtype: null" in refusal(
    precision_recovery="toward-zero", act_quant_dtype="int8"
)
assert policy.effective()["algo_args"] == {"pull": 0.25}
keys = {key.path: key for key in recipe_keys(CalibrationConfig)}
assert "toward-zero" in keys["ptq.precision_recovery"].values
assert "pulled toward zero" in keys["ptq.algo_args.pull"].description

# Planning: statistics, workspace and operations.
layer = read_architecture(CONFIG).layers[0]
both = [dict.fromkeys((linear.name for linear in layer.linears), p) for p in (plain, policy)]
taken = [required_statistics(layer.inputs, policies, gram=False) for policies in both]
assert {settings.gram for settings in taken[0].values()} == {False}
assert {settings.weighted_gram for settings in taken[1].values()} == {True}
bytes_ = [solver_bytes(layer, policies, taken[1]) for policies in both]
assert bytes_[1] - bytes_[0] == 1000 * 128, bytes_  # of the costliest linears, gate_proj and up_proj
operations = [solver_operations(layer, policies, taken[1]) for policies in both]
assert operations[1] - operations[0] == 7 * sum(n.out_features * n.in_features for n in layer.linears)

# Dispatch and label.
weight = np.array([[-12.7, 6.3, 0.3, 12.75]], np.float32)
solved, notes = round_weight(weight, policy, GramObjective(np.eye(4, dtype=np.float32)), "float32")
assert (solved.codes.tolist(), notes) == ([[-127, 63, 3, 127]], ("pulled toward zero",)), solved.codes
assert policy.label == "TowardZero-W8-perchannel"
print("taken up")
