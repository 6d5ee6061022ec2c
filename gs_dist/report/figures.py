"""What is drawn, as Vega-Lite specifications: plain data, without a colour of its own for text.

Grammar: https://vega.github.io/vega-lite/docs/spec.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gs_dist.report.heat_map import HeatMap
from gs_dist.results.summary import StageSummary

__all__ = ["Specification", "account_figure", "heat_map_figure", "memory_figure", "ratio_figure"]

Specification = Mapping[str, Any]

_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
# Text takes the page's colour, so that one drawing serves light and dark.
_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
_CONFIG = {
    "background": None,
    "padding": {"left": 30, "right": 12, "top": 4, "bottom": 4},  # browsers' fonts are wider than those measured here
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {**_TEXT, "domain": False, "ticks": False, "gridColor": "currentColor", "gridOpacity": 0.15},
    "legend": _TEXT,
}
_LEGEND = {"orient": "top", "gradientLength": 240, "tickCount": 4}
_STEP_X, _STEP_Y = 16, 20
_BAR = 18
_GIB = 1 << 30
_KINDS = {
    "load": "#4c78a8",
    "pass": "#54a24b",
    "partial sums": "#b279a2",
    "solve": "#f58518",
    "write": "#e45756",
    "idle": "#9d9d9d",
}


def heat_map_figure(matrix: HeatMap, what: str) -> Specification:
    """Roles down, layers across, colour by the logarithm of the value; each cell says its linear and its number."""
    positive = [cell.value for cell in matrix.cells if cell.value > 0 and math.isfinite(cell.value)]
    floor = min(positive, default=1.0)
    values = [
        {"layer": cell.layer, "role": cell.role, "value": max(cell.value, floor), "text": cell.text(what)}
        for cell in matrix.cells
        if math.isfinite(cell.value)
    ]
    scale = {"type": "log"} if positive and max(positive) > floor else {}
    color = {
        "field": "value",
        "type": "quantitative",
        "title": what,
        "scale": {"scheme": "viridis", **scale},
        "legend": {**_LEGEND, "format": ".1~e"},
    }
    return _matrix(matrix, values, color)


def ratio_figure(matrix: HeatMap, what: str) -> Specification:
    """Likewise of ratios: orange above 1, blue below it."""
    cells = [(cell, math.log2(cell.value)) for cell in matrix.cells if cell.value > 0 and math.isfinite(cell.value)]
    values = [{"layer": c.layer, "role": c.role, "value": value, "text": c.text(what)} for c, value in cells]
    reach = max([1.0, *(abs(value) for _, value in cells)])
    color = {
        "field": "value",
        "type": "quantitative",
        "title": what,
        "scale": {"scheme": "blueorange", "domain": [-reach, reach], "domainMid": 0},
        "legend": {**_LEGEND, "labelExpr": "format(pow(2, datum.value), '.2~g') + ' x'"},
    }
    return _matrix(matrix, values, color)


def _matrix(matrix: HeatMap, values: Sequence[Mapping[str, Any]], color: Mapping[str, Any]) -> Specification:
    every = max(1, len(matrix.layers) // 20)
    shown = {"labelAngle": 0, "values": list(matrix.layers[::every])}
    encoding = {
        "x": {"field": "layer", "type": "ordinal", "title": "layer", "axis": shown},
        "y": {
            "field": "role",
            "type": "nominal",
            "title": None,
            "sort": list(matrix.roles),
            "axis": {"labelLimit": 260},
        },
        "color": color,
        "description": {"field": "text"},
    }
    return _drawn(values, "rect", encoding, width={"step": _STEP_X}, height={"step": _STEP_Y})


def account_figure(stages: Sequence[StageSummary]) -> Specification:
    """A bar a worker: seconds by kind of work, and those that it waited."""
    values = [
        {"worker": _worker(stage), "kind": kind, "seconds": spent, "order": n, "text": f"{kind}: {spent:.3g} s"}
        for stage in stages
        for n, (kind, spent) in enumerate({**stage.account, "idle": stage.idle_seconds}.items())
        if spent > 0
    ]
    kinds = list(dict.fromkeys([*(kind for stage in stages for kind in stage.account), "idle"]))
    encoding = {
        "x": {"field": "seconds", "type": "quantitative", "title": "seconds"},
        "y": {"field": "worker", "type": "nominal", "title": None, "sort": None},
        "color": {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "sort": kinds,
            "scale": {"domain": kinds, "range": [_KINDS.get(kind, "#72b7b2") for kind in kinds]},
            "legend": {"orient": "top"},
        },
        "order": {"field": "order", "type": "quantitative"},
        "description": {"field": "text"},
    }
    return _drawn(values, "bar", encoding, width=520, height={"step": _BAR})


def memory_figure(stages: Sequence[StageSummary]) -> Specification:
    """A bar a worker for what it took at most, and a mark for what was planned."""
    values = [
        {
            "worker": _worker(stage),
            "planned": stage.peak_memory_planned / _GIB,
            "measured": (stage.peak_memory_measured or 0) / _GIB,
        }
        for stage in stages
    ]
    worker = {"field": "worker", "type": "nominal", "title": None, "sort": None}
    layers = [
        {
            "mark": {"type": "bar", "color": "#4c78a8"},
            "encoding": {
                "x": {"field": "measured", "type": "quantitative", "title": "GiB", "axis": {"tickCount": 6}},
                "y": worker,
            },
        },
        {
            "mark": {"type": "tick", "color": "#e45756", "thickness": 3, "size": _BAR - 2},
            "encoding": {"x": {"field": "planned", "type": "quantitative"}, "y": worker},
        },
    ]
    body = {"layer": layers, "width": 520, "height": {"step": _BAR}}
    return {"$schema": _SCHEMA, "data": {"values": values}, **body, "config": _CONFIG}


def _worker(stage: StageSummary) -> str:
    return f"stage {stage.stage}, replica {stage.replica}"


def _drawn(values: Sequence[Mapping[str, Any]], mark: str, encoding: Mapping[str, Any], **size: Any) -> Specification:
    return {
        "$schema": _SCHEMA,
        "data": {"values": list(values)},
        "mark": mark,
        "encoding": encoding,
        **size,
        "config": _CONFIG,
    }
