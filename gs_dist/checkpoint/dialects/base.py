"""What a checkpoint dialect must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer

__all__ = ["Codec", "KVKind", "Policies"]

Policies = Mapping[str, QuantPolicy | None]
"""Policy by full dotted name of a linear (`model.layers.3.mlp.down_proj`); None or absent: it stays as it is."""

KVKind = str | None
"""How a layer's KV cache is quantised: "per_channel", "per_token", or None where it stays as it is."""


class Codec(Protocol):
    """A dialect: names, dtypes and shapes of stored tensors, and the files that describe them.

    `lm_head` is carried over in float by every dialect, whatever policy it is given.
    """

    @property
    def name(self) -> str:
        """Spelling in a recipe's `format`; also the directory's name in the output."""

    @property
    def number_formats(self) -> tuple[NumberFormat, ...]:
        """What weights it can store."""

    @property
    def makes_biases(self) -> bool:
        """Whether its engine adds biases that the source model lacks: of norms, and of static linears (quant_bias)."""

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        """Refuses what the dialect cannot express, before any work.

        Returns:
            Notes for the user: what will be written in a form that some engines do not load.

        Raises:
            UserError: names the linear and the setting to change.
        """

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, npt.NDArray[Any]]:
        """Full tensor name to array, everything that the layer's shard holds."""

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        """Full name to dtype and shape of what `encode_layer` must have written.

        A tensor that stays in float is listed with the dtype "": it has its source's.
        """

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        """Content of the output's config.json, `source` being the model's; `kv_cache` maps layer to kind."""

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        """Name to JSON content of further files of the model directory."""

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        """Inverse of `encode_layer`; policies are rebuilt as far as the checkpoint tells them.

        Args:
            reader: opened with `quantized=True`.
            layer: index of the decoder layer.

        Raises:
            CheckpointError: tensors that the description calls for are missing or have another form.
        """
