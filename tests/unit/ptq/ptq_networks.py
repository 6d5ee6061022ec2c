"""Tiny networks of cells that the tests of the PTQ class share."""

from __future__ import annotations

import re
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import nn

from gs_dist.ptq import KVCache, NetworkHelper

Array = npt.NDArray[Any]
CHANNELS, HIDDEN = 64, 128


def random_dense(rng: np.random.Generator, columns: int, rows: int, **kwargs: Any) -> nn.Dense:
    """An nn.Dense with weights drawn from `rng`."""
    cell = nn.Dense(columns, rows, **kwargs)
    cell.weight.set_data(ms.Tensor((rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)))
    if cell.bias is not None:
        cell.bias.set_data(ms.Tensor(rng.standard_normal(rows).astype(np.float32)))
    return cell


class DecoderLayer(nn.Cell):
    """Not attention, but linears, a cache and a residual in a decoder layer's places."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.q_proj = random_dense(rng, CHANNELS, CHANNELS)
        self.cache = KVCache(2, CHANNELS // 2)
        self.up_proj = random_dense(rng, CHANNELS, HIDDEN, activation="relu")
        self.down_proj = random_dense(rng, HIDDEN, CHANNELS, has_bias=False)

    def construct(self, x):
        key, value = self.cache(self.q_proj(x), x)
        return x + self.down_proj(self.up_proj(key + value))


class Decoder(nn.Cell):
    """Two decoder layers and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.layers = nn.CellList([DecoderLayer(rng), DecoderLayer(rng)])
        self.head = random_dense(rng, CHANNELS, 10)

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Mlp(nn.Cell):
    """Two linears in a SequentialCell, with a function between."""

    def __init__(self, seed: int = 1, *, has_bias: bool = True) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.body = nn.SequentialCell(
            random_dense(rng, CHANNELS, HIDDEN, has_bias=has_bias),
            nn.Tanh(),
            random_dense(rng, HIDDEN, 8, has_bias=has_bias),
        )

    def construct(self, x):
        return self.body(x)


def batches(num: int = 4, seed: int = 2, outlier: float = 20.0) -> list[Array]:
    """Activations (2, 8, CHANNELS) with one channel much larger than the others."""
    rng = np.random.default_rng(seed)
    size = np.ones(CHANNELS, np.float32)
    size[3] = outlier
    return [(rng.standard_normal((2, 8, CHANNELS)) * size).astype(np.float32) for _ in range(num)]


def relative_error(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted|."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def parameter_values(network: nn.Cell) -> dict[str, Array]:
    """Copies of all parameters by name."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


class Helper(NetworkHelper):
    """Runs the network on what it is given and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def generate(self, network, input_ids, max_new_tokens=None, **kwargs):
        self.asked.append({"max_new_tokens": max_new_tokens, **kwargs})
        return network(ms.Tensor(input_ids))


def strategies(printed: str) -> dict[str, str]:
    """Rows of a printed summary."""
    cells = [re.findall(r"[^|\s]+", line) for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[2:]}  # after title and column names
