"""A recipe from the command line: a model directory and a scheme by name, or a recipe's file."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.shipped_text import SHIPPED_TEXT
from gs_dist.errors import DatasetError, RecipeError
from gs_dist.recipe.config import CalibrationConfig, config_of, load_recipe
from gs_dist.recipe.presets import find_preset
from gs_dist.recipe.sections import CalibrationData
from gs_dist.wording import is_uri, without_secrets

__all__ = ["DEFAULT_SCHEME", "Request", "again"]

DEFAULT_SCHEME = "w8a8-dynamic"
_DEFAULT_SAMPLES, _DEFAULT_LENGTH = 128, 512


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was typed: `source` is a model directory or a recipe, the rest options, None where they were left out."""

    source: Path
    overrides: Sequence[str] = ()
    scheme: str | None = None
    data: Sequence[str] | None = None
    output: Path | None = None
    format: Sequence[str] | None = None
    samples: int | None = None
    length: int | None = None

    def config(self) -> CalibrationConfig:
        """The whole recipe.

        Raises:
            RecipeError: something of it is wrong; all of it is told.
            CheckpointError: the directory holds no model.
        """
        if self.source.is_dir():
            return config_of(self.document(), self.overrides, source="quantize")
        if self.scheme is not None:
            raise RecipeError(
                f"--scheme goes with a model directory, and {self.source} is "
                f"{'a recipe, which says its own (ptq)' if self.source.exists() else 'not there'}"
            )
        return load_recipe(self.source, [*self._settings(), *self.overrides])

    def document(self) -> dict[str, Any]:
        """The keys of the recipe that a model directory and a scheme stand for.

        Raises:
            RecipeError: the directory is none of a model, or the scheme is unknown.
            CheckpointError: the directory holds no model.
        """
        if not (self.source / "config.json").exists():
            raise RecipeError(
                f"{self.source} is a directory without config.json: name the directory of a model, or a recipe's file"
            )
        architecture = CheckpointReader(self.source).architecture
        if self.output is None:
            raise RecipeError(f"-o is missing: where is the quantised {self.source.name} to go? Write -o DIRECTORY")
        linears = {linear.in_features for layer in architecture.layers for linear in layer.linears}
        document = find_preset(self.scheme or DEFAULT_SCHEME).document(linears)
        length = min(self.length or _DEFAULT_LENGTH, architecture.max_position_embeddings)
        data = list(self.data or [str(SHIPPED_TEXT)])
        return {
            "model": str(self.source),
            "output": str(self.output),
            "calibration": {
                "data": data,
                "num_samples": self.samples or self._samples_of(data, length),
                "sequence_length": length,
            },
            **document,
            **({} if self.format is None else {"format": list(self.format)}),
        }

    def _samples_of(self, data: Sequence[str], length: int) -> int:
        """How many samples are taken where nobody says: all that there are, up to a limit; that one of unseen data."""
        here = any(glob.glob(os.path.expanduser(entry), recursive=True) for entry in data)
        if any(map(is_uri, data)) or not here:
            return _DEFAULT_SAMPLES
        from gs_dist.data.dataset import open_dataset  # imports Arrow

        reader = CheckpointReader(self.source)
        try:
            dataset = open_dataset(
                CalibrationData(data=tuple(data), num_samples=_DEFAULT_SAMPLES, sequence_length=length),
                reader.architecture.vocab_size,
                reader.tokenizer_file,
                eos_token_id=reader.architecture.end_of_text_id,
                fewer_samples=True,
            )
        except DatasetError:  # which whoever reads them tells
            return _DEFAULT_SAMPLES
        return dataset.num_samples

    def _settings(self) -> list[str]:
        """The options as settings over a recipe."""
        given = {
            "calibration.data": None if self.data is None else f"[{', '.join(self.data)}]",
            "calibration.num_samples": self.samples,
            "calibration.sequence_length": self.length,
            "output": self.output,
            "format": None if self.format is None else f"[{', '.join(self.format)}]",
        }
        return [f"{key}={value}" for key, value in given.items() if value is not None]


def again(config: CalibrationConfig) -> str:
    """The line that runs a finished job's recipe again; secrets of URIs are left to be put in."""
    settings = [f"model={config.model}", f"output={config.output}"]
    settings.append(f"calibration.data=[{', '.join(map(without_secrets, config.calibration.data))}]")
    return shlex.join(["gs-dist", "quantize", f"{config.output}/recipe.yaml", *settings])
