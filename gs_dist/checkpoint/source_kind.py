"""What a directory holds that is no float causal language model, told by its files and tensor names.

People point at adapters, at quantised models and at rerankers. Each is refused by what it is, with what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.errors import CheckpointError
from gs_dist.model.dtypes import FLOATS
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["refuse_adapter", "refuse_foreign_names", "refuse_quantized", "refuse_stale_config", "refuse_unmerged"]

ADAPTER_FILE = "adapter_config.json"

# Files of other tools that tell loaders of quantised weights, and who writes them.
_MARKERS: dict[str, str] = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
}
# Leaf of a tensor's name to what writes it.
_QUANTIZED_LEAVES: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8 in blocks",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "nested_quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "deq_scale": "ModelSlim or Golden Stick",
    "weight_offset": "ModelSlim or Golden Stick",
    "weight_scale_2": "ModelOpt",
    "weight_scale": "compressed-tensors, ModelOpt or ModelSlim",
    "input_scale": "compressed-tensors, ModelOpt or ModelSlim",
}
_FLOATS = ("float64", *FLOATS)
_ADAPTERS = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module|ia3_l"
    r"|vera_lambda_[bd]|boft_[RS]|oft_R|hada_[wt][12]_?[ab]?|lokr_[wt][12]_?[ab]?)(\.|$)"
)
_FLOAT_MODEL = "set model to the directory of the float checkpoint it was made from"
_OTHER_HEADS: Mapping[str, str] = {
    "score.": "a classifier, reward model or reranker",
    "classifier.": "a classifier",
    "v_head.": "a model with a value head, as reinforcement learning trains them",
    "value_head.": "a model with a value head, as reinforcement learning trains them",
    "reward_head.": "a reward model",
    "rm_head.": "a reward model",
    "regression_head.": "a reward model",
    "qa_outputs.": "a model that marks answers in texts",
}
_WRAPPERS: Mapping[str, str] = {
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
}
_VISION = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "language_model.")


def refuse_adapter(directory: Path) -> None:
    """Refuses a directory that an adapter was saved into, alone or beside a model.

    Raises:
        CheckpointError: there is an adapter_config.json.
    """
    if not (directory / ADAPTER_FILE).exists():
        return
    if any(path.name.startswith("model") for path in directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{ADAPTER_FILE}: an adapter (LoRA) lies beside the model's weights, and loaders differ on whether it "
            "counts; move the adapter's files away if it is merged into the weights, else merge it first (peft: "
            "merge_and_unload(), save_pretrained)"
        )
    raise CheckpointError(
        f"{ADAPTER_FILE}: this is an adapter (LoRA), not a model; merge it into its base model (peft: "
        "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(new)), then set model to "
        "the new directory"
    )


def refuse_quantized(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses weights that are quantised, and files that say so of weights which are not.

    Raises:
        CheckpointError: either; the message names the file or key, the method, and what to change.
    """
    found = _quantized_tensor(tensors)
    marker = _marker(directory, config)
    if found is None and marker is None:
        return
    if found is None:
        refuse_stale_config(directory, config, tensors)
        return
    name, kind = found
    info = tensors[name]
    tensor = f"{info.file}: tensor {name!r:.200} ({info.dtype}) is of quantised weights ({kind})"
    if marker is None:
        raise CheckpointError(
            f"{tensor}, though config.json has no quantization_config, so this checkpoint is quantised already; "
            f"{_FLOAT_MODEL}"
        )
    where, method, _ = marker
    raise CheckpointError(f"{where} describes quantised weights ({method}), and {tensor}: {_FLOAT_MODEL}")


def refuse_stale_config(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses what says of weights that they are quantised, where every one is in float.

    Raises:
        CheckpointError: a key of config.json or a file does; the message names it, the method, and what to change.
    """
    marker = _marker(directory, config)
    if marker is None or _quantized_tensor(tensors) is not None:
        return
    where, method, remedy = marker
    raise CheckpointError(
        f"{where} speaks of quantised weights ({method}), and every tensor is in float, as when an adapter was "
        f"merged into a model that had been loaded in few bits; {remedy} if the weights are what they should be"
    )


def _marker(directory: Path, config: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What says that weights are quantised: where, by which method, and how to take it away."""
    stated = config.get("quantization_config")
    if stated is not None:
        method = stated.get("quant_method") if isinstance(stated, Mapping) else None
        remedy = "remove the key from config.json"
        return "config.json: quantization_config", f"{method or 'of no known method'!s:.60}", remedy
    if isinstance(config.get("compression_config"), Mapping):  # what compressed-tensors called it once
        return "config.json: compression_config", "compressed-tensors", "remove the key from config.json"
    own = {d.description_file: d.title for d in DIALECTS.values() if d.description_file is not None}
    for name, method in (_MARKERS | own).items():
        if (directory / name).is_file():
            return name, method, "move the file away"
    return None


def _quantized_tensor(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The name of a tensor that belongs to quantised weights, and what writes such; the most telling one."""
    leaves = {name: name.rpartition(".")[2] for name in tensors}
    for leaf, kind in _QUANTIZED_LEAVES.items():
        for name, own in leaves.items():
            if own == leaf:
                return name, kind
    for name, info in tensors.items():
        if ".quant_state." in name or "quant_state.bitsandbytes" in name:
            return name, "bitsandbytes"
        if info.dtype.startswith("float8"):
            return name, "FP8"
        if leaves[name] == "weight" and info.dtype not in _FLOATS:
            return name, "integers"
    return None


def refuse_unmerged(names: Sequence[str]) -> None:
    """Refuses names by which an adapter that is not merged, or a training framework's wrapper, is known.

    Raises:
        CheckpointError: there is one.
    """
    lora = next((name for name in names if _ADAPTERS.search(name)), None)
    if lora is not None:
        raise CheckpointError(
            f"tensor {lora!r:.200} belongs to an adapter (LoRA or its like) that is not merged; merge it (peft: "
            "merge_and_unload(), save_pretrained), then set model to the new directory"
        )
    for prefix, wrapper in _WRAPPERS.items():
        wrapped = next((name for name in names if name.startswith(prefix)), None)
        if wrapped is not None:
            raise CheckpointError(
                f"tensor {wrapped!r:.200}: names begin with {prefix!r}, as {wrapper} saves them, and loaders look for "
                f"{wrapped.removeprefix(prefix)!r:.200}; save the model itself with save_pretrained"
            )


def refuse_foreign_names(tensors: Iterable[str], *, tied: bool) -> None:
    """Refuses names by which another kind of model is known.

    Args:
        tensors: all names.
        tied: whether the head is the embedding, so that a decoder without head is a whole model.

    Raises:
        CheckpointError: adapters that are not merged, another head, a decoder without prefix, a wrapper's names.
    """
    names = list(tensors)
    refuse_unmerged(names)
    for head, kind in _OTHER_HEADS.items():
        other = next((name for name in names if name.startswith(head)), None)
        if other is not None:
            raise CheckpointError(
                f"tensor {other!r:.200}: this is {kind}, and causal language models are served; set model to one, or "
                "take the head away by loading it with AutoModelForCausalLM and saving it again"
            )
    vision = next((name for name in names if name.removeprefix("model.").startswith(_VISION)), None)
    if vision is not None:
        raise CheckpointError(
            f"tensor {vision!r:.200}: this model reads images too, and text-only decoders are served; save its "
            "language model by itself, then set model to that"
        )
    bare = next((name for name in names if name.startswith(("layers.", "embed_tokens.", "norm."))), None)
    if bare is not None and not any(name.startswith("model.") for name in names):
        headless = not tied and "lm_head.weight" not in names
        head = (
            " It has no head, and config.json ties none to the embedding: it may be no language model."
            if headless
            else ""
        )
        raise CheckpointError(
            f"tensor {bare!r:.200}: names lack the prefix 'model.', as embedding models and rerankers are saved: save "
            "the causal language model itself (AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)), then "
            f"set model to the new directory.{head}"
        )
