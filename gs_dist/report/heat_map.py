"""Figures of the linears as a matrix of roles by layers; experts of one role share a cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gs_dist.results.quantized import LinearSummary
from gs_dist.wording import counted, one_line

__all__ = ["Cell", "HeatMap", "heat_map"]

Figure = Callable[[LinearSummary], float | None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One role in one layer: the worst of its linears, and how many there are."""

    layer: int
    role: str
    value: float
    name: str
    count: int

    def text(self, what: str) -> str:
        """`model.layers.3.mlp.up_proj: error 0.0012`."""
        of_many = f", the worst of {counted(self.count, 'linear')}" if self.count > 1 else ""
        return f"{one_line(self.name)}: {what} {self.value:.3g}{of_many}"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Roles in the model's order without what all names share, layers ascending, and the cells that have a figure."""

    roles: tuple[str, ...]
    layers: tuple[int, ...]
    cells: tuple[Cell, ...]

    def __bool__(self) -> bool:
        return bool(self.cells)

    def at(self, layer: int, role: str) -> Cell | None:
        """The cell, or None where nothing is known."""
        return next((cell for cell in self.cells if (cell.layer, cell.role) == (layer, role)), None)

    def table(self) -> list[tuple[int, list[float | None]]]:
        """A row a layer, with a value or None for each role."""
        values = {(cell.layer, cell.role): cell.value for cell in self.cells}
        return [(layer, [values.get((layer, role)) for role in self.roles]) for layer in self.layers]


def heat_map(rows: Iterable[LinearSummary], figure: Figure) -> HeatMap:
    """The matrix of a figure, the largest of the linears that share a cell."""
    groups: dict[tuple[int, str], list[tuple[float, str]]] = {}
    for row in rows:
        value = figure(row)
        if value is not None:
            groups.setdefault((row.layer, row.role), []).append((value, row.name))
    shared = _shared({role for _, role in groups})
    cells = [
        Cell(layer=layer, role=one_line(role[len(shared) :]), value=max(found)[0], name=max(found)[1], count=len(found))
        for (layer, role), found in groups.items()
    ]
    return HeatMap(
        roles=tuple(dict.fromkeys(cell.role for cell in cells)),
        layers=tuple(sorted({cell.layer for cell in cells})),
        cells=tuple(cells),
    )


def _shared(roles: set[str]) -> str:
    """What all roles begin with, up to a dot."""
    parts = [role.split(".")[:-1] for role in roles]
    alike = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return "".join(f"{column[0]}." for column in alike)
