"""`mindspore_gs.ptq.models`: from a model directory to a quantised one in three calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gs_dist.errors import UserError
from gs_dist.golden_stick.ptq.ptq import PTQ
from gs_dist.ptq.config import BackendTarget, PTQConfig
from gs_dist.ptq.decoder import CausalDecoder, DecoderHelper
from gs_dist.ptq.saving import save_pretrained

__all__ = ["AutoModel", "AutoQuantForCausalLM"]


class AutoQuantForCausalLM:
    """A decoder with the weights of a Hugging Face directory; made by `from_pretrained`.

    Attributes:
        network: the decoder; `calibrate` quantises it.
    """

    def __init__(self, directory: Path, network: CausalDecoder) -> None:
        self._directory = directory
        self.network = network

    @classmethod
    def from_pretrained(cls, pretrained: str | os.PathLike[str]) -> AutoQuantForCausalLM:
        """Reads a Hugging Face directory of floats.

        Raises:
            UserError: `pretrained` is a file: MindFormers' YAML files are not read.
            CheckpointError: the directory is damaged, or of a model type that is not served.
        """
        directory = Path(pretrained)
        if directory.is_file():
            raise UserError(
                f"{str(pretrained)!r} is a file: give the directory of the Hugging Face checkpoint that its "
                "pretrained_model_dir or load_checkpoint names"
            )
        return cls(directory, DecoderHelper(directory).create_network())

    def calibrate(self, ptq_config: PTQConfig, layers_policy: Any = None, datasets: Any = None) -> None:
        """Quantises the network on calibration data; arguments are those of `PTQ` and of its `apply`."""
        PTQ(ptq_config, layers_policy).apply(self.network, DecoderHelper(self._directory), datasets)

    def save_quantized(
        self,
        save_path: str | os.PathLike[str],
        backend: BackendTarget = BackendTarget.ASCEND,
        *,
        format: str = "golden-stick",
    ) -> str:
        """Writes a directory that an engine loads, see `gs_dist.ptq.save_pretrained`, and returns its path.

        Args:
            save_path: the directory to make.
            backend: ASCEND; the files of NONE, which no engine reads, are not written.
            format: `golden-stick`, `ascend`, `compressed-tensors` or `gptq`.

        Raises:
            UserError: another backend, or a format that cannot express how the network is quantised.
        """
        if backend is not BackendTarget.ASCEND:
            raise UserError(
                f"backend is {backend}: the files of that target are read by no engine; leave it out, or choose a "
                "format, such as compressed-tensors"
            )
        return str(save_pretrained(self.network, save_path, model=self._directory, format=format))

    def save_pretrained(self, save_path: str | os.PathLike[str]) -> str:
        """The older name of `save_quantized`."""
        return self.save_quantized(save_path)


AutoModel = AutoQuantForCausalLM
