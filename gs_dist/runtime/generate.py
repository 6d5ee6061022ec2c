"""What a published model goes on to say, beside what the float model says; in this process, without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.device import Device, open_device
from gs_dist.calibration.generation import Generator
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.finished_model import find_models
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.chat import ChatTemplate
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import UserError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import FLOATS
from gs_dist.progress import Progress
from gs_dist.recipe.sizes import format_bytes
from gs_dist.runtime.evaluation_worker import FLOAT

__all__ = ["Continuation", "generate"]

_SHARE_OF_MEMORY = 0.9  # of what is free; the rest is for activations and the cache


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What one model said.

    Attributes:
        model: `FLOAT`, or the format's name.
        prompt: index of the prompt.
        text: the continuation, special tokens left out.
        tokens: its ids.
        ended: whether the model ended it, and not the limit.
    """

    model: str
    prompt: int
    text: str
    tokens: tuple[int, ...]
    ended: bool


def generate(
    directory: str,
    prompts: Sequence[str],
    *,
    model: str | None = None,
    dialects: Sequence[str] = (),
    max_new_tokens: int = 64,
    chat: bool | None = None,
    progress: Progress,
) -> tuple[Continuation, ...]:
    """Continuations of each prompt by the float model, if one is named, then by each published one.

    Every token is the likeliest one, so that the same command gives the same text.

    Args:
        directory: a job's output, or the model directory within it.
        prompts: texts, or what a user says where `chat`.
        model: directory of the float model, None to leave it out.
        dialects: those to run; every one that the directory holds where none is named.
        max_new_tokens: at most.
        chat: whether prompts go through the model's chat template; None where it has one.
        progress: told which model runs.

    Raises:
        UserError: a directory cannot be used, the model has no tokenizer or no template, a prompt has no token, or
            memory does not suffice.
    """
    published = find_models(Path(directory), dialects)
    device = open_device()
    found: list[Continuation] = []
    names = ([FLOAT] if model is not None else []) + list(published)
    for name in names:
        float_model = name == FLOAT
        place = Path(model or "") if float_model else published[name]
        reader = CheckpointReader(place, quantized=not float_model)
        _refuse_too_large(reader.architecture, device)
        progress.message(f"{'the float' if float_model else f'the {name}'} model: loading")
        encoded = _encoded(reader, place, prompts, chat)
        generator = _loaded(reader, None if float_model else name, device)
        if not generator.keeps_cache:
            progress.message("attention of this kind keeps no cache here: every token runs the whole text again")
        tokenizer = _tokenizer(reader, place)
        for number, ids in enumerate(encoded):
            tokens = tuple(generator.tokens(ids, max_new_tokens))
            ended = bool(tokens) and tokens[-1] in reader.architecture.eos_token_ids
            text = tokenizer.decode(tokens)
            found.append(Continuation(model=name, prompt=number, text=text, tokens=tokens, ended=ended))
    return tuple(found)


def _loaded(reader: CheckpointReader, dialect: str | None, device: Device) -> Generator:
    """All weights on the device, turned back into floats once."""
    network = DecoderNetwork(reader.architecture, device)
    layers = []
    for index in range(reader.architecture.num_layers):
        if dialect is None:
            layers.append(network.layer_weights(index, reader.read_layer(index)))
        else:
            layers.append(network.layer_weights(index, {}, quantized=codec_of(dialect).decode_layer(reader, index)))
    return Generator(network, network.outer_weights(reader.read_outer()), layers)


def _tokenizer(reader: CheckpointReader, place: Path) -> TextTokenizer:
    if reader.tokenizer_file is None:
        raise UserError(f"{place} holds no tokenizer.json: copy that of the float model into it")
    return TextTokenizer(reader.tokenizer_file)


def _encoded(
    reader: CheckpointReader, place: Path, prompts: Sequence[str], chat: bool | None
) -> list[npt.NDArray[np.int32]]:
    """Ids of each prompt; a template writes its special tokens itself."""
    template = ChatTemplate.of_model(place) if chat is not False else None
    if chat and template is None:
        raise UserError(f"--chat: {place} has no chat template; leave it out, and the text is continued as it is")
    texts = list(prompts)
    if template is not None:
        try:
            texts = [template.render([{"role": "user", "content": text}], ask=True) for text in prompts]
        except ValueError as error:
            raise UserError(f"{error}; with --no-chat the text is continued as it is") from None
    encoded = _tokenizer(reader, place).encode(texts, add_special_tokens=template is None)
    for text, ids in zip(prompts, encoded, strict=True):
        if not len(ids):
            raise UserError(f"prompt {text!r} has no token: write some text")
    return [ids.astype(np.int32) for ids in encoded]


def _refuse_too_large(architecture: DecoderArchitecture, device: Device) -> None:
    layers = [architecture.layer_tensors(index) for index in range(architecture.num_layers)]
    shapes = [shape for tensors in (*layers, architecture.outer_tensors()) for shape in tensors.values()]
    dtype = "float32" if device.kind.on_host else architecture.dtype
    needed, free = sum(map(math.prod, shapes)) * FLOATS[dtype].itemsize, device.free_memory()
    if needed > free * _SHARE_OF_MEMORY:
        raise UserError(
            f"the model takes {format_bytes(needed)} as {dtype}, and {format_bytes(free)} of memory are free: generate "
            "holds it in one process; run it where there is more memory, or serve the model with its engine"
        )
