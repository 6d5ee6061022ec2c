"""The templates of pages, what they may call, and the drawings that they place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gs_dist.recipe.sizes import format_bytes
from gs_dist.report.drawing import DrawingError, Figure, draw
from gs_dist.wording import printable

__all__ = ["render"]


def render(template: str, figures: Mapping[str, Figure], **values: Any) -> str:
    """A page; where its figures cannot be drawn it says so, and has their tables all the same.

    Args:
        template: its file.
        figures: what the template places, by name.
        values: what else it shows.
    """
    drawings: dict[str, Markup] = {}
    undrawn = ""
    try:
        drawings = {name: Markup(svg) for name, svg in (draw(figures) if figures else {}).items()}
    except DrawingError as error:
        undrawn = str(error)
    return _environment().get_template(template).render(drawings=drawings, undrawn=undrawn, **values)


def _environment() -> Environment:
    """Escapes every text; what would steer a reader's screen is spelt out."""
    environment = Environment(
        loader=PackageLoader("gs_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_spelt_out,
    )
    environment.filters |= {"number": _number, "size": _size, "share": _share}
    return environment


def _spelt_out(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _size(value: int | None) -> str:
    return "" if value is None else format_bytes(value)


def _share(value: float) -> str:
    return f"{value:.0%}"
