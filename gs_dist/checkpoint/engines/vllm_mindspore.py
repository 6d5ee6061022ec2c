"""vLLM-MindSpore 0.5.1 and a7b56a4: what its reader demands of a directory.

Sources: `vllm_mindspore/model_executor/layers/quantization/golden_stick/golden_stick.py` (description file),
`golden_stick/a8w8.py` (tensors), `model_executor/layers/linear.py` (shapes are asserted, dtypes of row-parallel
linears are not cast), and vLLM's `model_loader/weight_utils.py`, get_quant_config (which file is read).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gs_dist.checkpoint.engines.base import Engine, serve_command
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["ENGINE"]

_OWN = DIALECTS["golden-stick"].describing_file
_FILES = (_OWN, DIALECTS["ascend"].describing_file, "quant_model_description_w8a8sc.json")
_KINDS = ("FLOAT", "W8A8")  # quantization_method_mapping, without W8A8S, which is for the 310P alone
_FUSED = ((r"\b[qkv]_proj$", "qkv_proj"), (r"\b(gate|up)_proj$", "gate_up_proj"))


def _check(inventory: Inventory, layout: Layout, version: str) -> None:
    """Applies the reader's rules to a golden-stick directory; no other dialect is loaded.

    ModelSlim's layout has a class of its own, which fails: 0.5.1 ends building its linear with an AttributeError.
    """
    if layout.dialect != "golden-stick":
        expected = f"{_OWN}: of ModelSlim's layout 0.5.1 builds no linear (AttributeError, _primitives)"
        inventory.report(CONFIG_FILE, "engine-format", f"{layout.dialect} checkpoint", expected)
        return
    found = sorted(p.name for p in inventory.directory.glob("*.json") if p.name.endswith(_FILES))
    if len(found) > 1:
        expected = "one description file by the end of its name (weight_utils.py, get_quant_config)"
        inventory.report(found[1], "description-single", " and ".join(found), expected)
    _check_consistency(inventory, _OWN)
    for name, kind in layout.kinds.items():
        if kind not in _KINDS:
            expected = "FLOAT or W8A8 (golden_stick.py, quantization_method_mapping)"
            inventory.report(_OWN, "engine-kind", kind, expected, name)
    _check_row_parallel(inventory, layout)


def _check_consistency(inventory: Inventory, file: str) -> None:
    """`golden_stick.py`, _validate_quantization_consistency: one label a module, and across fused modules."""
    labels: dict[str, dict[str, str]] = {}
    for key, label in inventory.descriptions[file].items():
        module = key.rpartition(".")[0]
        if not module:
            continue
        labels.setdefault(module, {}).setdefault(str(label), key)
        for pattern, fused in _FUSED:
            if re.search(pattern, module):
                labels.setdefault(re.sub(pattern, fused, module), {}).setdefault(str(label), key)
    for module, found in labels.items():
        if len(found) > 1:
            text = ", ".join(f"{key.rpartition('.')[2]}: {label}" for label, key in found.items())
            expected = "one label for all its tensors (_validate_quantization_consistency)"
            inventory.report(file, "module-label", text, expected, module)


def _check_row_parallel(inventory: Inventory, layout: Layout) -> None:
    """`linear.py`, RowParallelLinear.weight_loader: input_scale is set as it is, so it has the model's dtype."""
    architecture = inventory.architecture
    assert architecture is not None  # a layout is built from it
    for name, kind in layout.kinds.items():
        info = inventory.tensors.get(name + ".input_scale")
        if kind == "W8A8" and info is not None and info.dtype != architecture.dtype:
            inventory.report_tensor(info.name, "engine-dtype", info.dtype, f"{architecture.dtype}, the model's")


def _serve(dialect: str, architecture: DecoderArchitecture, notes: Sequence[Note]) -> str:
    return serve_command("vLLM-MindSpore", f"vllm-mindspore serve DIRECTORY --quantization {dialect}")


ENGINE = Engine(
    name="vllm-mindspore",
    title="vLLM-MindSpore",
    dialects=("golden-stick",),
    token_step=TokenStep.OVER_127,  # likewise; of W8A8 alone nothing is rounded by token
    check=_check,
    serve=_serve,
    versions=("0.5.1",),
)
