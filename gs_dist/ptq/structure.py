"""Finding what can be quantised in a network, and copying a network with some cells exchanged.

The caller's network is never changed. What is handed back is a structural copy: its cells are new, its
parameters are the caller's own unless a cell was exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import mint, nn

from gs_dist.errors import UserError
from gs_dist.ptq.cells import LinearForm, linear_form

__all__ = ["NetworkLayer", "copy_network", "display_name", "find_layers", "find_linears", "is_linear"]


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
