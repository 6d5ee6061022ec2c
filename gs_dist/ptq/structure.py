"""Finding what can be quantised in a network, and exchanging some of its cells, in a copy or in place.

A copy is structural: its cells are new, its parameters are the caller's own unless a cell was exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import mint, nn

from gs_dist.errors import UserError
from gs_dist.ptq.cells import LinearForm, linear_form

__all__ = [
    "NetworkLayer",
    "copy_network",
    "display_name",
    "exchange_cells",
    "find_layers",
    "find_linears",
    "is_linear",
]


@dataclass(frozen=True, kw_only=True)
class NetworkLayer:
    """A decoder layer of a network, or the whole network where no decoder layers are known.

    Attributes:
        index: its number in the network.
        name: full dotted name of the layer's cell, empty for the network itself.
        linears: forms of the linears within, in order of registration.
    """

    index: int
    name: str
    linears: tuple[LinearForm, ...]


def is_linear(cell: Any) -> bool:
    """Whether the cell computes x W^T + b and nothing else; a subclass with a `construct` of its own does not."""
    kinds = (nn.Dense, mint.nn.Linear)
    return any(isinstance(cell, kind) and type(cell).construct is kind.construct for kind in kinds)


def find_linears(network: Any) -> list[LinearForm]:
    """All linears of a network; one that is registered twice is found once, under its first name."""
    return [linear_form(name, cell) for name, cell in network.cells_and_names() if is_linear(cell)]


def find_layers(network: Any, layer_types: Sequence[type]) -> list[NetworkLayer]:
    """The outermost cells of `layer_types` with their linears; none if there are no such cells."""
    found: list[tuple[str, Any]] = []
    for name, cell in network.cells_and_names():
        nested = any(name.startswith(f"{outer}.") or not outer for outer, _ in found)
        if isinstance(cell, tuple(layer_types)) and not nested:
            found.append((name, cell))
    linears = find_linears(network)
    return [
        NetworkLayer(
            index=index,
            name=name,
            linears=tuple(form for form in linears if not name or form.name.startswith(f"{name}.")),
        )
        for index, (name, _) in enumerate(found)
    ]


def display_name(name: str) -> str:
    """A cell's name for people; the network itself has none of its own."""
    return name or "network"


def copy_network(network: Any, exchanged: Mapping[str, Any] | None = None, *, share_parameters: bool = True) -> Any:
    """A copy of the network's cells in which those named in `exchanged` are replaced.

    Every reference to a replaced cell within the network is replaced: children, entries of lists, a cell
    registered twice. References that a Python closure holds cannot be seen.

    Args:
        network: any Cell; not changed.
        exchanged: full dotted name to the cell that takes its place.
        share_parameters: let the copy hold the parameters of the original instead of copies of them.

    Raises:
        UserError: a part of the network cannot be copied.
    """
    exchanged = exchanged or {}
    memo: dict[int, Any] = {}
    if share_parameters:
        memo.update((id(parameter), parameter) for parameter in network.get_parameters())
    for name, cell in network.cells_and_names():
        if name in exchanged:
            memo[id(cell)] = exchanged[name]
    try:
        return copy.deepcopy(network, memo)
    except TypeError as error:
        raise UserError(
            f"{type(network).__name__} cannot be copied ({error}): keep what copy.deepcopy does not take, such as open "
            "files and locks, out of its attributes"
        ) from error


def exchange_cells(network: Any, exchanged: Mapping[str, Any]) -> None:
    """Replaces the cells named in `exchanged` within the network itself.

    Children, and entries of lists, tuples and dicts that cells have as attributes, are replaced wherever they occur.
    References that a Python closure or the caller holds cannot be seen.

    Args:
        network: any Cell; changed.
        exchanged: full dotted name to the cell that takes its place.

    Raises:
        UserError: the network itself is to be replaced, which only a copy can do.
    """
    if "" in exchanged:
        raise UserError(
            f"{type(network).__name__} is itself the linear, and a network cannot take its own place: put it into a "
            "cell, or use gs_dist.ptq, whose apply returns a new network"
        )
    cells = dict(network.cells_and_names())
    replacements = {id(cells[name]): cell for name, cell in exchanged.items()}
    for holder in cells.values():
        for name, child in holder._cells.items():
            if id(child) in replacements:
                holder._cells[name] = replacements[id(child)]
        for name, value in list(vars(holder).items()):
            replaced = value if name.startswith("_") else _with_replaced(value, replacements)
            if replaced is not value:
                object.__setattr__(holder, name, replaced)  # MindSpore's own would take a list of cells apart


def _with_replaced(value: Any, replacements: Mapping[int, Any]) -> Any:
    """A list, tuple or dict of an attribute with its cells replaced; anything else as it is."""
    if type(value) in (list, tuple) and any(id(entry) in replacements for entry in value):
        return type(value)(replacements.get(id(entry), entry) for entry in value)
    if type(value) is dict and any(id(entry) in replacements for entry in value.values()):
        return {key: replacements.get(id(entry), entry) for key, entry in value.items()}
    return replacements.get(id(value), value)
