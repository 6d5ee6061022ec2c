"""Loading a checkpoint into a quantised network, with nothing left out in silence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mindspore as ms

from gs_dist.calibration.device import current_device
from gs_dist.checkpoint.weight_files import INDEX_FILE
from gs_dist.errors import CheckpointError
from gs_dist.ptq.published import load_published

__all__ = ["load_parameters"]

logger = logging.getLogger(__name__)


def load_parameters(network: Any, path: str) -> None:
    """Sets all parameters of `network` from a .ckpt or .safetensors file, or from what a job published.

    Args:
        network: a converted network, or one that DEPLOY built; changed in place.
        path: the file, or the model.safetensors.index.json of a job's model directory.

    Raises:
        CheckpointError: not a checkpoint, a parameter is missing, or one has another shape or data type.
    """
    if Path(path).name == INDEX_FILE:
        # Whatever device the caller chose for MindSpore.
        device = current_device()
        load_published(network, Path(path).parent, device)
        return
    kind = "safetensors" if path.endswith(".safetensors") else "ckpt"
    try:
        stored = ms.load_checkpoint(path, format=kind)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"ckpt_path {path!r} is not a {kind} checkpoint: {error}") from error
    wanted = {parameter.name: parameter for parameter in network.get_parameters()}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"ckpt_path {path!r} lacks {len(missing)} of {len(wanted)} parameters, {missing[0]} among them: save it "
            "from a converted network of the same config (ms.save_checkpoint(ptq.convert(...), ...))"
        )
    for name, parameter in wanted.items():
        value = stored[name]
        if tuple(value.shape) != tuple(parameter.shape) or value.dtype != parameter.dtype:
            raise CheckpointError(
                f"ckpt_path {path!r}: {name} is {value.dtype} {tuple(value.shape)}, where the network has "
                f"{parameter.dtype} {tuple(parameter.shape)}"
            )
    unused = sorted(set(stored) - set(wanted))
    if unused:
        logger.warning("%s: %d parameters have no place in the network, %s among them", path, len(unused), unused[0])
    for name, parameter in wanted.items():
        parameter.set_data(ms.Tensor(stored[name].asnumpy()) if stored[name].dtype != ms.bfloat16 else stored[name])
