"""Vega-Lite specifications drawn as SVG that stands inside a page: readable without scripts, by screen readers too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass

from gs_dist.report.figures import Specification

__all__ = ["DrawingError", "Figure", "draw"]

_SVG = "http://www.w3.org/2000/svg"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_PATIENCE = 300.0  # seconds; a hundred layers take three


class DrawingError(RuntimeError):
    """The process that draws gave nothing."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is to be drawn, and what it shows, for those who do not see it."""

    specification: Specification
    label: str


def draw(figures: Mapping[str, Figure]) -> dict[str, str]:
    """The drawings as SVG elements, by name; what a drawing refers to within itself starts with its name.

    Raises:
        DrawingError: the process that draws failed.
    """
    asked = json.dumps({name: figure.specification for name, figure in figures.items()})
    try:
        command = [sys.executable, "-m", "gs_dist.report.vega"]
        drawn = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_PATIENCE, check=True)
        return {name: _embedded(svg, name, figures[name].label) for name, svg in json.loads(drawn.stdout).items()}
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()
        raise DrawingError(
            f"nothing was drawn (exit code {error.returncode}): {reason[0] if reason else ''}"
        ) from error
    except (OSError, ValueError, subprocess.TimeoutExpired, ElementTree.ParseError) as error:
        raise DrawingError(f"nothing was drawn: {error}") from error


def _embedded(svg: str, name: str, label: str) -> str:
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter():
        _name_apart(element, name)
        _say_on_hover(element)
    return ElementTree.tostring(root, encoding="unicode")


def _name_apart(element: ElementTree.Element, name: str) -> None:
    """Drawings of one page would share the names of their gradients."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif "url(#" in value:
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _say_on_hover(element: ElementTree.Element) -> None:
    """What a mark says to screen readers, browsers show under the pointer as an SVG title."""
    said = element.attrib.pop("aria-label", None) if element.get("aria-roledescription", "").endswith("mark") else None
    for attribute in ("role", "aria-roledescription"):
        if element.tag != f"{{{_SVG}}}svg":
            element.attrib.pop(attribute, None)
    if said is not None:
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = said
        element.insert(0, title)
