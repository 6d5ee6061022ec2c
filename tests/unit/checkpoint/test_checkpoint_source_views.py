"""Tensors that are decoded when they are asked for."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gs_dist.checkpoint.source_views import LazyTensors


def test_threads_that_ask_for_one_tensor_share_one_copy() -> None:
    """Blocks of a weight are worked on side by side: each decoding it for itself would take its memory once a thread,
    which no plan counts.
    """
    decoded, together = Counter[str](), threading.Barrier(4)

    def load() -> np.ndarray:
        decoded["a"] += 1
        return np.full(3, decoded["a"])

    tensors = LazyTensors({"a": load})

    def ask(_: int) -> np.ndarray:
        together.wait(timeout=10)
        return tensors["a"]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert decoded["a"] == 1
    assert all(array is found[0] for array in found)


def test_a_tensor_that_someone_holds_is_not_decoded_again() -> None:
    """However many others were asked for since; one that nobody holds is given up."""
    decoded = Counter[str]()

    def loader(name: str):  # type: ignore[no-untyped-def]  # torch is untyped
        def load() -> np.ndarray:
            decoded[name] += 1
            return np.zeros(2)

        return load

    names = [f"t{number}" for number in range(12)]
    tensors = LazyTensors({name: loader(name) for name in names})
    held = tensors["t0"]
    for name in names:
        assert tensors[name] is not None
    assert tensors["t0"] is held
    assert tensors["t1"] is not None
    assert (decoded["t0"], decoded["t1"]) == (1, 2)


def test_asking_whether_a_tensor_is_there_decodes_nothing() -> None:
    """Solvers ask for every bias."""

    def load() -> np.ndarray:
        raise AssertionError("decoded")

    tensors = LazyTensors({"a": load})
    assert "a" in tensors
    assert "b" not in tensors
