"""Any directory of safetensors: its config, its tensors by header, and their bytes on demand.

Nothing is known of the network, so that nothing is compared with one; that files, index and headers belong together
is checked as for any checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.companions import Companions, find_companions
from gs_dist.checkpoint.header import TensorInfo, read_json
from gs_dist.checkpoint.paths import contained_path
from gs_dist.checkpoint.published_config import refuse_unwritable
from gs_dist.checkpoint.source_kind import refuse_adapter
from gs_dist.checkpoint.source_tensors import HEAD_KEPT
from gs_dist.checkpoint.sources.own_head import own_head, says_tied, with_own_head
from gs_dist.checkpoint.weight_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, WeightFiles, fingerprint_of, some
from gs_dist.errors import CheckpointError

__all__ = ["FileStamp", "SourceDirectory", "TensorBytes"]


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """What tells that a file is still the one whose header was read: size in bytes, time of change in nanoseconds."""

    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Of a file's status."""
        return cls(size=status.st_size, changed=status.st_mtime_ns)


class SourceDirectory:
    """A checkpoint directory, opened by its headers alone.

    Attributes:
        directory: where it lies.
        config: content of config.json; with `tie_word_embeddings` false wherever a head of other values is stored.
        tensors: name to `TensorInfo`, in the order in which they lie on storage: by file, then by offset.
        stamps: each file as it was when its header was read.
        notes: where index and files disagree, and no loader minds.
    """

    def __init__(self, directory: Path | str) -> None:
        """Reads config.json, the index and every header.

        Raises:
            CheckpointError: a file is missing, damaged, contradictory, shorter than its header says, or leads outside
                of the directory, or the index lists a tensor that no file holds.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"model: {str(directory)!r} is not a directory; set model to a checkpoint directory")
        refuse_adapter(self.directory)
        self._config_path = contained_path(self.directory, CONFIG_FILE)
        self.config: dict[str, Any] = read_json(self._config_path, CONFIG_FILE)
        refuse_unwritable(self.config)
        self._files = WeightFiles.find(self.directory)
        ordered = sorted(self._files.tensors.values(), key=lambda info: (info.file, info.offset, info.name))
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in ordered}
        self.stamps = {file: FileStamp.of(path.stat()) for file, path in self._files.paths.items()}
        self.notes = self._files.notes
        self._refuse_absent()
        # Engines that go by the flag alone would leave the head out.
        if says_tied(self.config) and (found := own_head(self._files)) is not None:
            self.config = with_own_head(self.config)
            self.notes = (*self.notes, HEAD_KEPT.format(head=found[0], embedding=found[1]))

    def _refuse_absent(self) -> None:
        """No network says which tensors there must be; the index does."""
        index_path = contained_path(self.directory, INDEX_FILE)
        if set(self._files.paths) == {SINGLE_FILE} or not index_path.exists():
            return
        listed = read_json(index_path, INDEX_FILE)["weight_map"]
        missing = [name for name in listed if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{listed[missing[0]]}: does not hold {some(missing)}, which {INDEX_FILE} lists there; download the "
                "file again, or correct the index if the model has no such tensor"
            )

    def companions(self) -> Companions:
        """The files that go along with the weights.

        Raises:
            CheckpointError: one that loaders read cannot be carried over.
        """
        return find_companions(self.directory)

    def fingerprint(self) -> str:
        """sha256, hexadecimal, of config.json and of headers, sizes and edges of the files (`fingerprint_of`)."""
        return fingerprint_of(self._config_path, self._files)


class TensorBytes:
    """Reads ranges of tensors' bytes into arrays of the caller's, each file opened once.

    Plain reads rather than a mapping: a mapping's pages count as the process's memory for as long as they are cached.
    """

    def __init__(self, directory: Path, files: Mapping[str, FileStamp]) -> None:
        self._directory = directory
        self._files = files
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> TensorBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, info: TensorInfo, start: int, target: npt.NDArray[Any]) -> None:
        """Fills a contiguous array with bytes of a tensor, from byte `start` of it on.

        Raises:
            CheckpointError: the file is shorter than its header said when it was opened, or cannot be read.
        """
        view = target.reshape(-1).view(np.uint8).data.cast("B")
        position = info.offset + start
        done = 0
        try:
            descriptor = self._open(info.file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], position + done)
                if count == 0:
                    raise CheckpointError(
                        f"{info.file}: ends within tensor {info.name!r:.200}: it changed since it was opened; leave "
                        "the model alone during a conversion"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror})") from error

    def _open(self, file: str) -> int:
        if file not in self._descriptors:
            descriptor = os.open(contained_path(self._directory, file), os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[file] = descriptor
            if FileStamp.of(os.fstat(descriptor)) != self._files[file]:
                raise CheckpointError(
                    f"{file}: changed since the checkpoint was opened; leave the model alone during a conversion"
                )
        return self._descriptors[file]
