"""MindFormers 2.1.0: what its reader demands of a directory.

Source: `mindformers/parallel_core/inference/quantization/golden_stick/config.py` (QUANTIZATION_METHOD_MAPPING: kinds of
linears; get_quant_method: a kind that is not in it is a KeyError), `a8w8.py`, `a8dynw8.py` (tensors). vLLM-MindSpore
serves its networks with VLLM_MS_MODEL_BACKEND=MindFormers.
"""

from __future__ import annotations

from collections.abc import Sequence

from gs_dist.checkpoint.engines.base import Engine, serve_command
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["ENGINE"]

_KINDS = ("FLOAT", "W8A8", "W8A8_DYNAMIC")


def _check(inventory: Inventory, layout: Layout, version: str) -> None:
    """Applies the reader's rules to a golden-stick directory; no other dialect was tried."""
    if layout.dialect != "golden-stick":
        expected = f"{DIALECTS['golden-stick'].describing_file} (config.py, get_config_filenames)"
        inventory.report(CONFIG_FILE, "engine-format", f"{layout.dialect} checkpoint", expected)
        return
    for name, kind in layout.kinds.items():
        if kind not in _KINDS:
            expected = f"{', '.join(_KINDS)}: another is a KeyError (config.py, QUANTIZATION_METHOD_MAPPING)"
            inventory.report(DIALECTS[layout.dialect].describing_file, "engine-kind", kind, expected, name)


def _serve(dialect: str, architecture: DecoderArchitecture, notes: Sequence[Note]) -> str:
    command = f"VLLM_MS_MODEL_BACKEND=MindFormers vllm-mindspore serve DIRECTORY --quantization {dialect}"
    return serve_command("MindFormers", command)


ENGINE = Engine(
    name="mindformers",
    title="MindFormers",
    dialects=("golden-stick",),
    token_step=TokenStep.OVER_127,  # MindSpore `ops.auto_generate.DynamicQuantExt`, which is CANN aclnnDynamicQuant
    check=_check,
    serve=_serve,
    versions=("2.1.0",),
)
