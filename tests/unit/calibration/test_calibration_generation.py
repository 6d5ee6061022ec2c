"""Continuations token by token, with kept keys and values, against passes over the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from runs import run_inline, small_recipe

from gs_dist.calibration.device import open_device
from gs_dist.calibration.generation import Generator
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader

PROMPT = np.random.default_rng(3).integers(3, 128, 9).astype(np.int32)


def loaded(directory: Path, dialect: str | None = None) -> Generator:
    reader = CheckpointReader(directory, quantized=dialect is not None)
    network = DecoderNetwork(reader.architecture, open_device("cpu"))
    layers = []
    for index in range(reader.architecture.num_layers):
        if dialect is None:
            layers.append(network.layer_weights(index, reader.read_layer(index)))
        else:
            layers.append(network.layer_weights(index, {}, quantized=codec_of(dialect).decode_layer(reader, index)))
    return Generator(network, network.outer_weights(reader.read_outer()), layers)


def margins(generator: Generator, ids: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Likeliest tokens from one pass over the text, and how far each is ahead of the next one."""
    hidden = generator.network.embed(generator.outer, ids[None])
    for weights in generator.layers:
        hidden, _ = generator.network.forward_layer(weights, hidden, capture=False)
    logits = generator.network.logits(generator.outer, hidden).asnumpy()[0, start - 1 : -1]
    ordered = np.sort(logits, axis=-1)
    return logits.argmax(axis=-1), ordered[:, -1] - ordered[:, -2]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"tie": True}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("olmo2", {}),
        ("deepseek_v2", {}),
    ],
)
def test_tokens_are_those_of_whole_passes(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Each token is the likeliest behind all before it, for every kind of layer, kept keys or not."""
    generator = loaded(tiny_checkpoint(tmp_path / kind, kind, **config))
    assert generator.keeps_cache == (kind != "deepseek_v2")
    tokens = list(generator.tokens(PROMPT, 12))
    ids = np.array([*PROMPT, *tokens], np.int32)
    wanted, ahead = margins(generator, ids, len(PROMPT))
    clear = ahead > 1e-3
    assert clear.sum() > len(tokens) // 2
    np.testing.assert_array_equal(np.array(tokens)[clear], wanted[clear])


def test_rounded_cache_is_kept_rounded(tmp_path: Path) -> None:
    """An int8 cache holds what it would give back: tokens are those of the pass that rounds keys and values."""
    config = small_recipe(
        tmp_path,
        num_layers=2,
        format=["compressed-tensors"],
        ptq={"weight_quant_dtype": "int8", "kvcache_quant_dtype": "int8"},
    )
    run_inline(config)
    generator = loaded(Path(config.output) / "compressed-tensors", "compressed-tensors")
    assert generator.layers[0].kv_schemes == ("per_channel", "per_channel")
    tokens = list(generator.tokens(PROMPT, 12))
    wanted, ahead = margins(generator, np.array([*PROMPT, *tokens], np.int32), len(PROMPT))
    np.testing.assert_array_equal(np.array(tokens)[ahead > 1e-2], wanted[ahead > 1e-2])


def test_a_token_that_ends_the_text_is_the_last(tmp_path: Path) -> None:
    """Nothing is made behind it, and the limit holds."""
    generator = loaded(tiny_checkpoint(tmp_path / "model"))
    tokens = list(generator.tokens(PROMPT, 5))
    assert len(tokens) == 5
    ended = loaded(tiny_checkpoint(tmp_path / "ended", eos_token_id=tokens[2]))
    assert list(ended.tokens(PROMPT, 5)) == tokens[: tokens.index(tokens[2]) + 1]
