"""The decoder against transformers (golden values) and against plain NumPy."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from gs_dist.architecture import DecoderArchitecture
from gs_dist.calibration.device import Device, open_device
from gs_dist.calibration.network import CAPTURED, DecoderNetwork

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

import make_golden_logits as golden  # noqa: E402  (lies beside the values it made)


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("cpu")


def load(directory: Path) -> tuple[DecoderArchitecture, dict[str, Any]]:
    """Architecture and tensors of a checkpoint of one file."""
    config = json.loads((directory / "config.json").read_text())
    with safe_open(directory / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping: has no __iter__)
    return DecoderArchitecture.from_config(config), tensors


def within(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_are_those_of_transformers(name: str, device: Device, tmp_path: Path) -> None:
    """Every served model type gives the logits of the independent implementation, to float32 rounding."""
    directory = golden.build(name, tmp_path)
    with safe_open(DATA / "golden_logits.safetensors", "np") as file:
        expected = file.get_tensor(name)
        digests = json.loads(file.metadata()["digests"])
    assert golden.digest(directory) == digests[name], "the weights changed: run tests/data/make_golden_logits.py again"
    architecture, tensors = load(directory)
    network = DecoderNetwork(architecture, device)
    outer = network.outer_weights(tensors)
    hidden = network.embed(outer, golden.input_ids())
    for layer in range(architecture.num_layers):
        weights = network.layer_weights(within(tensors, architecture.layer_prefix(layer)))
        hidden, captured = network.forward_layer(weights, hidden, capture=layer == 0)
        assert set(captured) == (set(CAPTURED) if layer == 0 else set())
    logits = device.to_numpy(network.logits(outer, hidden))[:, golden.POSITIONS]
    assert np.abs(logits - expected).max() < 3e-6 * np.abs(expected).max()
