"""Checkpoints whose config.json and tensors disagree compute what transformers makes of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.reader import CheckpointReader

DATA = Path(__file__).parents[2] / "data"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = script("make_source_logits")


@pytest.mark.parametrize("name", MADE.CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """A head of its own, one stored alone, and rotary embeddings stated in several places or incompletely."""
    reader = CheckpointReader(MADE.build(name, tmp_path / "m"))
    network = DecoderNetwork(reader.architecture, open_device("cpu"))
    outer = network.outer_weights(reader.read_outer())
    hidden = network.embed(outer, MADE.input_ids())
    for layer in range(reader.architecture.num_layers):
        hidden, _ = network.forward_layer(network.layer_weights(layer, reader.read_layer(layer)), hidden, capture=False)
    logits = network.logits(outer, hidden).asnumpy()[:, MADE.POSITIONS]
    golden = load_file(DATA / "source_logits.safetensors")[name]
    np.testing.assert_allclose(logits, golden, rtol=0, atol=2e-4)
