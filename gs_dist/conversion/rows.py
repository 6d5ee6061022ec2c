"""What the summary says of a converted linear, and from what loss on it counts as destroyed."""

from __future__ import annotations

from collections.abc import Iterable

from gs_dist.checkpoint.sources.catalogue import layer_of
from gs_dist.conversion.schemes import Scheme
from gs_dist.errors import DestroyedError
from gs_dist.results.quantized import LinearSummary
from gs_dist.solvers.weight_loss import WeightLoss

__all__ = ["kept_row", "refuse_destroyed", "row_of"]

_NOTED_ZEROS = 0.5  # share of a linear's weights that became zero
_MOST_ZEROS = 0.9  # the same, from which a linear is destroyed whatever its energy
_SHOWN = 4  # destroyed linears in a message
OUTSIDE = -1  # layer of a linear that lies in none


def row_of(name: str, scheme: Scheme, loss: WeightLoss) -> LinearSummary:
    """The row of a linear whose blocks were all rounded.

    No token was seen: errors are those of the input channels' unit vectors, `relative_error` over all of them and
    `token_error` of the median one.
    """
    notes = [] if loss.relative_error is not None else ["all its weights are zero"]
    if loss.zeroed > _NOTED_ZEROS:
        notes.append(f"{loss.zeroed:.1%} of its weights became zero")
    return LinearSummary(
        layer=layer_of(name, OUTSIDE),
        name=name,
        strategy=scheme.strategy,
        relative_error=loss.relative_error,
        error_source="none" if loss.relative_error is None else "weight",
        scale_min=loss.scale_min,
        scale_max=loss.scale_max,
        num_tokens=0,
        notes=tuple(notes),
        token_error=loss.median_column_error,
        zeroed=loss.zeroed,
    )


def kept_row(name: str, reason: str) -> LinearSummary:
    """The row of a linear that stays in floats."""
    return LinearSummary(
        layer=layer_of(name, OUTSIDE),
        name=name,
        strategy="NA",
        relative_error=None,
        error_source="none",
        scale_min=None,
        scale_max=None,
        num_tokens=0,
        notes=(f"stays in floats: {reason}",),
    )


def refuse_destroyed(rows: Iterable[LinearSummary], ceiling: float | None) -> None:
    """Refuses linears that rounding destroyed; what is no number is above every ceiling.

    Args:
        rows: of converted linears.
        ceiling: `max_relative_error`; None lets everything pass.

    Raises:
        DestroyedError: there is one; the message names it, what is lost, and what to change.
    """
    if ceiling is None:
        return
    bad = {row.name: told for row in rows if (told := _destroyed(row, ceiling))}
    if bad:
        names = list(bad)
        lines = [f"{name}: {bad[name]}" for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"and {len(names) - _SHOWN} more")
        raise DestroyedError(
            f"destroyed by rounding: {'; '.join(lines)}; give them another scheme or null in layer_policies, or raise "
            f"max_relative_error, which is {ceiling:g}"
        )


def _destroyed(row: LinearSummary, ceiling: float) -> str:
    """What of a linear is lost, if more than the ceiling; empty where it is sound."""
    told = []
    if row.relative_error is not None and not row.relative_error <= ceiling:
        told.append(f"{row.relative_error:.3g} of the weight's energy is lost")
    if row.token_error is not None and not row.token_error <= ceiling:
        told.append(f"the median input channel loses {row.token_error:.3g} of its energy, which a few loud ones hide")
    if row.zeroed is not None and not row.zeroed <= max(ceiling, _MOST_ZEROS):
        told.append(f"{row.zeroed:.1%} of the weights become zero")
    return " and ".join(told)
