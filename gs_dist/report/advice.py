"""What to change for a linear that lost much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from gs_dist.methods.gptq import GPTQ
from gs_dist.numbers.table import WEIGHT_FORMATS
from gs_dist.results.quantized import LinearSummary

__all__ = ["NEGLIGIBLE", "Advice", "advise", "advise_converted"]

NEGLIGIBLE = 5e-3  # of an output's energy

# Engines run these as one matrix, so that they share a policy.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class Advice:
    """In words, and as an entry of `layer_policies` where a policy helps."""

    text: str
    entry: str | None = None


def advise(row: LinearSummary) -> Advice:
    """What would lower a linear's error most, from what the summary tells of it."""
    error = row.largest_error
    if error is None or error < NEGLIGIBLE:
        return Advice(text="Nothing: it loses less than half a percent of its output's energy.")
    if row.num_given is not None and row.num_given < row.num_tokens:
        return Advice(text="Few tokens reached this expert: raise calibration.num_samples, or give data that reach it.")
    parts = row.strategy.split("-")
    if "A8" in parts and (row.activation_error or 0.0) > (row.relative_error or 0.0):
        return _for_activations(row, static="pertensor" in parts[parts.index("A8") :])
    return _for_weights(row, parts)


# Strategy of activations to a conversion's scheme that keeps it and has weights of eight bits.
_EIGHT_BITS = {(): "W8A16", ("A8", "pertoken"): "W8A8_DYNAMIC"}


def advise_converted(row: LinearSummary) -> Advice:
    """The same of a linear that was converted without data, whose recipe names schemes."""
    error = row.largest_error
    if error is None or error < NEGLIGIBLE:
        return Advice(text="Nothing: it loses less than half a percent of its weight's energy.")
    weights, *_ = parts = row.strategy.split("-")
    if not any(form.label == weights and form.bits <= 4 for form in WEIGHT_FORMATS.values()):
        return Advice(text="Leave this linear in float.", entry=_entry(row, None))
    scheme = _EIGHT_BITS.get(tuple(parts[2:]))
    text = "Four bits cost much here: give it eight, or calibrate the model with gs-dist quantize, which has GPTQ."
    return Advice(text=text, entry=None if scheme is None else _entry(row, scheme))


def _for_activations(row: LinearSummary, *, static: bool) -> Advice:
    if static:
        policy = {"act_quant_granularity": "per_token"}
        return Advice(
            text="Rounded activations cost most: give each token a scale of its own.", entry=_entry(row, policy)
        )
    return Advice(
        text="Rounded activations cost most, with a scale for each token: leave its activations in float.",
        entry=_entry(row, {"act_quant_dtype": None, "act_quant_granularity": "per_tensor"}),
    )


def _for_weights(row: LinearSummary, parts: list[str]) -> Advice:
    bits = min((form.bits for form in WEIGHT_FORMATS.values() if form.label in parts), default=8)
    if bits > 4:
        return Advice(text="Leave this linear in float.", entry=_entry(row, None))
    if GPTQ.label not in parts:
        entry = _entry(row, {"precision_recovery": "gptq"})
        return Advice(text="Rounded weights cost most: let GPTQ make up for the rounding.", entry=entry)
    eight_bits = {
        "weight_quant_dtype": "int8",
        "weight_quant_granularity": "per_channel",
        "group_size": 0,
        "precision_recovery": "none",
    }
    return Advice(text="Four bits are too few here: give this linear eight.", entry=_entry(row, eight_bits))


def _entry(row: LinearSummary, policy: Mapping[str, Any] | str | None) -> str:
    """An entry of `layer_policies` for the linear and those that engines fuse with it."""
    parent, _, own = row.name.rpartition(".")
    fused = next((names for names in _FUSED if own in names), (own,))
    last = f"({'|'.join(fused)})" if len(fused) > 1 else re.escape(own)
    entry = {f"{re.escape(parent)}\\.{last}": dict(policy) if isinstance(policy, Mapping) else policy}
    return yaml.safe_dump(entry, default_flow_style=False, sort_keys=False, width=1000).rstrip()
