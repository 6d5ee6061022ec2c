"""Routers that decide by a hair or starve experts, on samples of several lengths, against transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork, RoutedActivation
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.model.decoder import MixtureOfExperts

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

import make_golden_routing as golden  # noqa: E402  (lies beside the values it made)

CLOSE = 1e-3  # what decides between the last chosen expert and the next


def layers(directory: Path) -> tuple[npt.NDArray[Any], list[dict[str, Any]], CheckpointReader]:
    """Logits of all tokens, and what each layer captured."""
    reader = CheckpointReader(directory)
    network = DecoderNetwork(reader.architecture, open_device("cpu", threads=1))
    outer = network.outer_weights(reader.read_outer())
    hidden, captured = network.embed(outer, golden.input_ids()), []
    for layer in range(reader.architecture.num_layers):
        weights = network.layer_weights(layer, reader.read_layer(layer))
        hidden, seen = network.forward_layer(weights, hidden, seen=golden.mask())
        captured.append(seen)
    return network.logits(outer, hidden).asnumpy(), captured, reader


def given(captured: dict[str, Any]) -> dict[str, int]:
    """Tokens of the samples that each expert was given, padding left out."""
    seen = golden.mask().reshape(-1)
    routed = {name: value for name, value in captured.items() if isinstance(value, RoutedActivation)}
    return {name: int(seen[value.tokens[: value.num_routed]].sum()) for name, value in routed.items()}


def gaps(captured: list[dict[str, Any]], reader: CheckpointReader) -> Iterator[npt.NDArray[Any]]:
    """By NumPy, how far the last chosen score of each token is from the next one; of each layer with plain scores."""
    for layer, seen in enumerate(captured):
        mlp = reader.architecture.layers[layer].mlp
        if not isinstance(mlp, MixtureOfExperts) or mlp.routing.num_groups > 1:
            continue
        router = reader.read_layer(layer)[f"{mlp.router.name}.weight"].astype(np.float64)
        logits = seen["mlp_input"].asnumpy()[golden.mask()].astype(np.float64) @ router.T
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        ordered = -np.sort(-scores / scores.sum(axis=1, keepdims=True), axis=1)
        yield ordered[:, mlp.routing.top_k - 1] - ordered[:, mlp.routing.top_k]


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Each token goes where it goes there, whatever decides it, and padding changes nothing."""
    logits, captured, reader = layers(golden.build(name, tmp_path / "m"))
    expected = load_file(DATA / "golden_routing.safetensors")[name]
    found = logits[golden.mask()][:: golden.EVERY]
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
    if "near_ties" in name:
        close = [(gap < CLOSE).mean() for gap in gaps(captured, reader)]
        assert all(share > 0.2 for share in close)
    if "starving" in name:
        counts = given(captured[-1])
        assert sum(counts.values()) == sum(golden.LENGTHS) * reader.architecture.layers[-1].mlp.routing.top_k
        assert sum(count == 0 for count in counts.values()) >= 4
