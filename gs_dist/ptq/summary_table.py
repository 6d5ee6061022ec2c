"""The table that `PTQ.summary` prints."""

from __future__ import annotations

from typing import Any

from gs_dist.ptq.cells import FakeQuantDense, QuantDense
from gs_dist.ptq.kv_cache import KVCache, QuantKVCache
from gs_dist.ptq.structure import display_name, is_linear

__all__ = ["strategy_rows", "strategy_table"]

TITLE = "Network Quantization Summary"
COLUMNS = ("layer_name", "quant_type")


def strategy_rows(network: Any) -> list[tuple[str, str]]:
    """Full name and strategy of every linear and KV cache of a network, `NA` for one that is not quantised."""
    rows = []
    for name, cell in network.cells_and_names():
        if isinstance(cell, FakeQuantDense | QuantDense | QuantKVCache):
            rows.append((display_name(name), cell.strategy))
        elif isinstance(cell, KVCache) or is_linear(cell):
            rows.append((display_name(name), "NA"))
    return rows


def strategy_table(rows: list[tuple[str, str]]) -> str:
    """A framed table of the rows under the title; empty text if there are none."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in (0, 1)]
    spare = len(TITLE) - sum(widths) - 3
    if spare > 0:
        widths[1] += spare
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    frame = "+" + "-" * (len(rule) - 2) + "+"

    def line(row: tuple[str, str]) -> str:
        return "| " + " | ".join(text.center(width) for text, width in zip(row, widths, strict=True)) + " |"

    head = [frame, f"|{TITLE.center(len(rule) - 2)}|", rule, line(COLUMNS), rule]
    return "\n".join([*head, *map(line, rows), rule])
