"""The checkpoint dialects of serving engines: one record each, from which everything that asks for them reads.

A record is data. The code that writes a dialect and the rules by which a directory of it is checked lie in the record's
`home`, far above recipes, which need the names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DIALECTS", "Dialect", "description_files"]

_ROOM = "gs_dist.checkpoint.dialects"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A dialect, as recipes, readers, checks and model cards know it.

    Attributes:
        name: spelling in a recipe's `format`; also the model directory's name in the output.
        title: what a model card calls it.
        home: package whose `codec.CODEC` writes and reads the dialect, and whose `layout.LAYOUT` says, apart from
            that, what a directory must hold (`gs_dist.checkpoint.dialects`).
        description_file: JSON file by which a directory is known; None where config.json tells.
        quant_method: value of that key of config.json's `quantization_config` by which a directory is known; None
            where a description file tells.
        elsewhere: what a model card says where an engine does not serve the directory and something else reads it.
        casts: whether all its readers cast floats to the dtype that they serve in.
        one_cache_scale: whether keys, and values, of a KV cache have one stored scale for all their channels.
    """

    name: str
    title: str
    home: str
    description_file: str | None = None
    quant_method: str | None = None
    elsewhere: str = ""
    casts: bool = True
    one_cache_scale: bool = False

    @property
    def describing_file(self) -> str:
        """The file that says how the weights are quantised."""
        return self.description_file or "config.json"


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="compressed-tensors",
            title="compressed-tensors",
            home=f"{_ROOM}.compressed_tensors",
            quant_method="compressed-tensors",
            one_cache_scale=True,
        ),
        Dialect(
            name="ascend",
            title="ModelSlim's layout",
            home=f"{_ROOM}.ascend",
            description_file="quant_model_description.json",
        ),
        Dialect(
            name="golden-stick",
            title="Golden Stick's layout",
            home=f"{_ROOM}.golden_stick",
            description_file="quantization_description.json",
            casts=False,  # vLLM-MindSpore 0.5.1 and MindFormers 2.1.0 set some parameters as they are
            elsewhere="Networks that Golden Stick builds load every strategy above.",
        ),
        Dialect(
            name="gptq",
            title="GPTQ's layout",
            home=f"{_ROOM}.gptq",
            quant_method="gptq",
        ),
    )
}
"""Name in a recipe's `format` to the dialect, in the order in which they are listed to users."""


def description_files() -> dict[str, str]:
    """Name of each description file to the dialect whose it is."""
    return {d.description_file: d.name for d in DIALECTS.values() if d.description_file is not None}
