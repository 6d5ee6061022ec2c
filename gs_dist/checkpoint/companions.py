"""Files that go with the weights: everything in the source directory, except what is listed here with its reason.

Tokenizers, chat templates, licences and policies come under names that nobody can list beforehand, so the list is of
what stays behind.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.paths import contained_path
from gs_dist.checkpoint.weight_files import INDEX_FILE, some
from gs_dist.checkpoint.writer import make_directory, publish
from gs_dist.errors import CheckpointError
from gs_dist.recipe.sizes import format_bytes

__all__ = ["Companions", "copy_companions", "find_companions"]

_MAX_FILE = 256 << 20  # bytes; tokenizers have up to some 40 MB
_MAX_FILES = 1000
_MAX_DEPTH = 4

# Pattern of a name to why such a file stays behind; the first that matches counts. "" is not worth a word.
_LEFT_FILES: Mapping[str, str] = {
    ".*": "",
    "*.safetensors": "weights that no loader reads",
    "*.safetensors.index.json": "an index of weights that no loader reads",
    "*.bin": "pickled",
    "*.pt": "pickled",
    "*.pth": "pickled",
    "*.ckpt": "pickled",
    "*.pkl": "pickled",
    "*.pickle": "pickled",
    "*.bin.index.json": "an index of pickled weights",
    "*.gguf": "weights in another form",
    "*.ggml": "weights in another form",
    "*.h5": "weights in another form",
    "*.keras": "weights in another form",
    "*.msgpack": "weights in another form",
    "*.index.json": "an index of weights in another form",
    "*.npz": "weights in another form",
    "*.npy": "weights in another form",
    "*.tflite": "weights in another form",
    "*.onnx*": "weights in another form",
    "*.mlmodel": "weights in another form",
    "*.nemo": "weights in another form",
    "*.distcp": "weights in another form",
    "params.json": "describes the weights under Mistral's or Meta's own names",
    "checklist.chk": "checksums of the float weights",
    "*.sha256": "checksums of the float weights",
    "*.md5": "checksums of the float weights",
    "*.py": "code",
    "*.pyc": "code",
    "*.so": "code",
    "*.sh": "code",
    "*quant*config*.json": "would tell loaders of another quantisation",
    "*quant*_description*.json": "would tell loaders of another quantisation",
    "adapter_config.json": "would tell loaders of an adapter",
    "trainer_state.json": "of the training",
    "events.out.tfevents*": "of the training",
    "*.tmp": "unfinished",
    "*.incomplete": "unfinished",
    "*.lock": "unfinished",
}
# The same of whole names, at the top of the directory alone: what a run writes itself.
_WRITTEN: Mapping[str, str] = {
    "config.json": "",
    "model*.safetensors": "",
    INDEX_FILE: "",
    "README.md": "this model gets a card of its own",
    "provenance.json": "of another quantised model",
}
_LEFT_FOLDERS: Mapping[str, str] = {
    ".*": "",
    "__pycache__": "",
    "original": "the model under Meta's own names",
    "metal": "weights in another form",
    "onnx*": "weights in another form",
    "openvino*": "weights in another form",
    "coreml*": "weights in another form",
    "gguf*": "weights in another form",
    "checkpoint-*": "of the training",
    "global_step*": "of the training",
    "runs": "of the training",
    "wandb": "of the training",
}
# What loaders read: a model without it would not be the same, so nothing of the kind is left behind.
_NEEDED = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "tekken*.json",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What goes along and what does not.

    Attributes:
        carried: name relative to the source directory, with `/`, to the file itself; in order of name.
        left: name of a file or folder to why it stays behind; names that need no reason are not in it.
    """

    carried: Mapping[str, Path]
    left: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What stays behind, a line for each reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        return tuple(f"left out of what is published: {some(names)} ({reason})" for reason, names in by_reason.items())


def find_companions(directory: Path) -> Companions:
    """Goes through a source directory without reading a file.

    Raises:
        CheckpointError: a file that loaders read, such as a tokenizer's, is too large or leads out of the directory, or
            there are very many files.
    """
    carried: dict[str, Path] = {}
    left: dict[str, str] = {}
    folders = [(directory, 1)]
    while folders:
        folder, depth = folders.pop()
        for path in _entries(folder):
            name = path.relative_to(directory).as_posix()
            if path.is_dir() and not path.is_symlink():
                reason = _reason(path.name, _LEFT_FOLDERS)
                if reason is None and depth < _MAX_DEPTH:
                    folders.append((path, depth + 1))
                else:
                    _leave(left, f"{name}/", "lies very deep" if reason is None else reason)
                continue
            reason = _reason(path.name, {**_WRITTEN, **_LEFT_FILES} if depth == 1 else _LEFT_FILES)
            if reason is not None:
                _leave(left, name, reason)
                continue
            fault = _fault(directory, name)
            if fault is None:
                carried[name] = contained_path(directory, name)
            elif any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _NEEDED):
                raise CheckpointError(
                    f"{name!r:.200}: {fault}, and loaders read a file of this name; put the right file itself into the "
                    "model's directory, or move this one away"
                )
            else:
                _leave(left, name, fault)
            if len(carried) > _MAX_FILES:
                raise CheckpointError(
                    f"model: {directory.name!r} holds more than {_MAX_FILES} files beside the weights; set model to a "
                    "directory of the model alone"
                )
    return Companions(carried=dict(sorted(carried.items())), left=dict(sorted(left.items())))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder.name!r:.200}: cannot be read ({error.strerror}); mend its permissions"
        ) from error


def _reason(name: str, table: Mapping[str, str]) -> str | None:
    return next((reason for pattern, reason in table.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _leave(left: dict[str, str], name: str, reason: str) -> None:
    if reason:
        left[name] = reason


def _fault(directory: Path, name: str) -> str | None:
    """Why a file cannot be carried over, None where it can."""
    if not name.isprintable():
        return "a name that no terminal shows"
    try:
        path = contained_path(directory, name)
        found = path.stat()
    except (CheckpointError, OSError):
        return "points outside of the directory, or nowhere"
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_size > _MAX_FILE:
        return f"of {format_bytes(found.st_size)}, more than the {format_bytes(_MAX_FILE)} of any tokenizer"
    return None if os.access(path, os.R_OK) else "cannot be read"


def copy_companions(companions: Companions, target: Path) -> list[str]:
    """Copies them into a model directory; returns their names, sorted.

    Raises:
        CheckpointError: a file is gone or has grown since it was found.
        OutputError: the directory cannot be written.
    """
    for name, source in companions.carried.items():
        parent = target
        for part in Path(name).parts[:-1]:
            parent = make_directory(parent / part)
        try:
            with source.open("rb") as stream, publish(target / name) as file:
                shutil.copyfileobj(stream, file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{name!r:.200}: is gone since the job began; put it back") from error
    return list(companions.carried)
