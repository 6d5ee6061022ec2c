"""Which weights of a checkpoint are linears to quantise, and which stay as they are: data, by family of models.

Nothing here is code of a network: names and shapes decide. What is kept is kept because engines read it in floats
(their loaders have no scheme there), or because quantising it costs accuracy and saves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["FAMILIES", "Family", "family_of", "fused_with", "kept_reason"]

_INDEX = r"(^|\.)"

# Patterns searched in a module's full name, and why what they match stays in floats, whatever the family.
_ALWAYS: tuple[tuple[str, str], ...] = (
    (
        _INDEX + r"(visual|vision_\w+|vit|audio_\w+|speech_\w+|image_\w+|siglip\w*|sam_model)(\.|$)",
        "encoder of images or sound",
    ),
    (
        _INDEX + r"(multi_modal_projector|mm_projector|embed_vision|embed_audio|patch_embed\w*|merger)(\.|$)",
        "encoder of images or sound",
    ),
    (_INDEX + r"(\w*embed\w*|wte|wpe)$", "embedding"),
    (_INDEX + r"(lm_head|head|output|embed_out|score|classifier)$", "output head"),
    (_INDEX + r"\w*norm\w*$", "norm"),
    (_INDEX + r"(gate|router|wg)$", "router of a mixture"),
    (_INDEX + r"router\.", "router of a mixture"),
    (_INDEX + r"shared_expert_gate$", "gate of a shared expert"),
    (_INDEX + r"kv_b_proj$", "taken apart by engines, which absorb it into attention"),
    (_INDEX + r"indexer\.", "indexer of sparse attention"),
    (_INDEX + r"(linear_attn|mamba|mixer)\.(in_proj_a|in_proj_b|in_proj_ba|dt_proj|x_proj)$", "small projection"),
    (_INDEX + r"conv\w*$", "convolution"),
    (_INDEX + r"(mtp|mtp_\w+|nextn\w*|eh_proj|enorm|hnorm)(\.|$)", "multi-token prediction"),
)

# Leaves that are linears of a decoder in every model that has them: what an unknown family is quantised at.
COMMON_LINEARS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is particular to a family.

    Attributes:
        kept: patterns beside those of all families, with reasons.
        experts_interleaved: gate and up alternate along the outputs of a fused `gate_up_proj`.
        expert_names: gate, up and down of an expert that is published on its own.
        known: whether this family was looked at; linears of another are taken by `COMMON_LINEARS` alone.
    """

    kept: tuple[tuple[str, str], ...] = ()
    experts_interleaved: bool = False
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    known: bool = True


_PLAIN = Family()
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llama", "mistral", "mistral3", "ministral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3"), _PLAIN
        ),
        **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "glm4", "phi3", "granite", "seed_oss"), _PLAIN),
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_text"), _PLAIN),
        **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"), _PLAIN),
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"), _PLAIN),
        **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "ernie4_5_moe"), _PLAIN),
        "mixtral": Family(expert_names=("w1", "w3", "w2")),
        "minimax_m2": Family(expert_names=("w1", "w3", "w2")),
        **dict.fromkeys(("qwen3_vl_moe", "llama4", "llama4_text"), _PLAIN),
        "gpt_oss": Family(experts_interleaved=True),
    }
)
"""`model_type` of config.json to what is particular to it."""

_UNKNOWN = Family(known=False)

# Linears that engines fuse into one, which then has one scheme.
_FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("gate_proj", "up_proj"),
)
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.")


def family_of(model_type: str) -> Family:
    """What is particular to a model type; a cautious default where nothing is known of it."""
    return FAMILIES.get(model_type, _UNKNOWN)


def kept_reason(name: str, family: Family) -> str | None:
    """Why a linear stays in floats unless it is asked for; None where it is to be quantised.

    Args:
        name: full name of the module (`model.layers.3.mlp.down_proj`).
        family: of the model.
    """
    for pattern, reason in (*family.kept, *_ALWAYS):
        if re.search(pattern, name):
            return reason
    leaf = name.rpartition(".")[2]
    if not family.known and leaf not in COMMON_LINEARS:
        return f"{leaf} of a model type that is not known"
    return None


def fused_with(name: str) -> str:
    """What engines make of a linear together with others: equal for all of them; its own name for one that stays."""
    expert = _EXPERT.match(name)
    if expert is not None:
        return expert["experts"]
    stem, dot, leaf = name.rpartition(".")
    members = next((members for members in _FUSED if leaf in members), None)
    return name if members is None else f"{stem}{dot}{'+'.join(members)}"
