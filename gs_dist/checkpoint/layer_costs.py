"""What schemes were found to cost the linears of a layer: `sensitivity/layer-00017.json` of a run's output."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from gs_dist.checkpoint.manifest import Fingerprints, part_stem
from gs_dist.checkpoint.writer import make_directory, write_json
from gs_dist.results.costs import LayerCosts, SchemeCost

__all__ = ["SENSITIVITY", "read_costs", "remove_costs", "write_costs"]

SENSITIVITY = "sensitivity"


def write_costs(output: Path, found: LayerCosts, fingerprints: Fingerprints) -> None:
    """Publishes a layer's costs; where its statistics are kept for a second look, they are in place already."""
    content = {"fingerprints": dataclasses.asdict(fingerprints), **dataclasses.asdict(found)}
    write_json(make_directory(output / SENSITIVITY) / f"{part_stem(found.layer)}.json", content)


def remove_costs(output: Path, layer: int) -> None:
    """Takes back what `write_costs` published, if anything."""
    (output / SENSITIVITY / f"{part_stem(layer)}.json").unlink(missing_ok=True)


def read_costs(output: Path, layer: int, fingerprints: Fingerprints) -> LayerCosts | None:
    """What `write_costs` published; None where there is nothing of these fingerprints that can be read."""
    try:
        content = json.loads((output / SENSITIVITY / f"{part_stem(layer)}.json").read_bytes())
        if content["layer"] != layer or Fingerprints(**content["fingerprints"]) != fingerprints:
            return None
        return LayerCosts(layer=layer, costs=tuple(SchemeCost(**cost) for cost in content["costs"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a damaged file is judged again, as if it were not there
