"""What kept statistics are of, held against the recipe that is to be solved from them."""

from __future__ import annotations

from pathlib import Path

from gs_dist.checkpoint.kept_statistics import StatisticsOrigin, read_origin
from gs_dist.checkpoint.manifest import MadeWith
from gs_dist.checkpoint.run_record import version_differences
from gs_dist.errors import OutputError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime.software import Software

__all__ = ["origin_of", "software_note"]


def origin_of(run: str, config: CalibrationConfig, source: str) -> StatisticsOrigin:
    """What the statistics kept in an output are of.

    Args:
        run: the output.
        config: the recipe that is to be solved from them.
        source: fingerprint of its model.

    Raises:
        OutputError: there are none, or they are of another model or calibration.
    """
    origin = read_origin(Path(run))
    calibration = config.fingerprint_fields()["calibration"]
    differing = [
        what
        for what, same in (
            ("model", origin.source == source),
            ("calibration", origin.calibration == calibration),
            ("propagation (it must be original)", config.propagation == "original"),
        )
        if not same
    ]
    if differing:
        raise OutputError(
            f"the statistics kept in {run!r} are of another {' and another '.join(differing)}: give the recipe the "
            "settings of that job, or run `gs-dist quantize` on it"
        )
    return origin


def software_note(run: str, origin: StatisticsOrigin) -> str | None:
    """What to tell where other versions took the statistics than are to solve from them."""
    if not origin.versions:
        return None
    different = version_differences(MadeWith(versions=origin.versions), Software.here().made_with)
    if not different:
        return None
    return (
        f"the statistics kept in {run!r} are of other software ({'; '.join(different)}): what is published may differ "
        "from what either version would make of the samples"
    )
