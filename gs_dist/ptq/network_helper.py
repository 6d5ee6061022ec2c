"""What the algorithm asks of a network's framework (`mindspore_gs.ptq.network_helpers.NetworkHelper`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NetworkHelper"]


class NetworkHelper:
    """Decouples the algorithm from the framework a network is written in: subclass it for yours.

    `PTQ.apply` calls `generate` alone, once for each row of the calibration data, with
    `do_sample=False, max_new_tokens=1`; everything else serves the programs around it.
    """

    def create_network(self) -> Any:
        """Makes the network that is to be quantised."""
        raise NotImplementedError(f"{type(self).__name__} does not define create_network")

    def get_spec(self, name: str) -> Any:
        """A setting of the network by name, such as `batch_size` or `seq_length`."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_spec")

    def create_tokenizer(self, **kwargs: Any) -> Any:
        """Makes the network's tokenizer."""
        raise NotImplementedError(f"{type(self).__name__} does not define create_tokenizer")

    def generate(
        self, network: Any, input_ids: npt.NDArray[np.generic], max_new_tokens: int | None = None, **kwargs: Any
    ) -> Any:
        """Runs `network` on `input_ids` (batch, sequence) and generates `max_new_tokens` more."""
        raise NotImplementedError(f"{type(self).__name__} does not define generate")

    def assemble_inputs(self, input_ids: npt.NDArray[np.generic], **kwargs: Any) -> Any:
        """Arguments of the network's `construct` for `input_ids` (batch, sequence)."""
        raise NotImplementedError(f"{type(self).__name__} does not define assemble_inputs")
