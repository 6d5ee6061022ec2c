"""What schemes were found to cost the linears of a layer: `sensitivity/layer-00017.json` of a run's output."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.lineage import Lineage
from gs_dist.checkpoint.manifest import Fingerprints, MadeWith, part_stem
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.writer import make_directory
from gs_dist.errors import DamagedError
from gs_dist.results.costs import LayerCosts, SchemeCost

__all__ = ["SENSITIVITY", "Judgement", "read_costs", "read_judgement", "remove_costs", "write_costs"]

SENSITIVITY = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Costs of a layer, and what they were taken of and with."""

    costs: LayerCosts
    fingerprints: Fingerprints
    made_with: MadeWith
    lineage: Lineage


def write_costs(
    output: Path, found: LayerCosts, fingerprints: Fingerprints, made_with: MadeWith, lineage: Lineage
) -> None:
    """Publishes a layer's costs; where its statistics are kept for a second look, they are in place already."""
    content = {
        "fingerprints": dataclasses.asdict(fingerprints),
        "made_with": dataclasses.asdict(made_with),
        "lineage": dataclasses.asdict(lineage),
        **dataclasses.asdict(found),
    }
    write_sealed_json(make_directory(output / SENSITIVITY) / f"{part_stem(found.layer)}.json", content)


def remove_costs(output: Path, layer: int) -> None:
    """Takes back what `write_costs` published, if anything."""
    (output / SENSITIVITY / f"{part_stem(layer)}.json").unlink(missing_ok=True)


def read_costs(output: Path, layer: int, fingerprints: Fingerprints) -> LayerCosts | None:
    """What `write_costs` published; None where there is nothing of these fingerprints.

    Raises:
        DamagedError: the file does not hold what was written.
    """
    found = read_judgement(output, layer)
    return found.costs if found is not None and found.fingerprints == fingerprints else None


def read_judgement(output: Path, layer: int) -> Judgement | None:
    """A layer's costs and what they were taken with; None where there are none.

    Raises:
        DamagedError: as above.
    """
    label = f"{SENSITIVITY}/{part_stem(layer)}.json"
    try:
        content = read_sealed_json(output / label, label)
    except FileNotFoundError:
        return None
    try:
        if content["layer"] != layer:
            raise DamagedError(f"{label}: is of layer {content['layer']}")
        return Judgement(
            costs=LayerCosts(layer=layer, costs=tuple(SchemeCost(**cost) for cost in content["costs"])),
            fingerprints=Fingerprints(**content["fingerprints"]),
            made_with=MadeWith(**content["made_with"]),
            lineage=Lineage(**content["lineage"]),
        )
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{label}: is not of this version ({error!s:.200})") from error
