"""Named presets of a recipe: what `gs-dist quantize MODEL --scheme NAME` stands for."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gs_dist.errors import RecipeError

__all__ = ["PRESETS", "Preset", "find_preset"]

_GROUP_SIZES = (128, 64)  # the first that divides every linear's input channels


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A scheme by name.

    Attributes:
        name: as users write it.
        about: what becomes of weights and activations.
        cost: what a job of it mostly does.
        loads: the engines that run it.
        perplexity: of SmolLM2-135M, whose float model has 30.28; see docs/accuracy.md.
        ptq: section of the recipe.
        grouped: whether weights are quantised in groups, whose size follows from the model.
        more: further keys of the recipe.
    """

    name: str
    about: str
    cost: str
    loads: str
    perplexity: str
    ptq: Mapping[str, Any]
    grouped: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def document(self, in_features: Collection[int]) -> dict[str, Any]:
        """The keys of a recipe that it sets, for linears of these input channels."""
        ptq: dict[str, Any] = {**self.ptq, "opname_blacklist": ["lm_head"]}
        if self.grouped:
            size = next((s for s in _GROUP_SIZES if all(n % s == 0 for n in in_features)), 0)
            groups = {"weight_quant_granularity": "per_group", "group_size": size}
            ptq |= groups if size else {"weight_quant_granularity": "per_channel"}
        return {"ptq": ptq, **self.more}

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.about}\n    costs {self.cost}; loads in {self.loads}; perplexity {self.perplexity}, "
            "of the float model 30.28"
        )


_W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "outliers_suppression": "smooth"}
_W4 = {
    "weight_quant_dtype": "qint4x2",
    "precision_recovery": "gptq",
    "algo_args": {"desc_act": True, "static_groups": True},
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="w8a8-dynamic",
                about="int8 weights, int8 activations with a scale for each token taken while serving; SmoothQuant",
                cost="little more than a forward pass",
                loads="vLLM, vLLM-Ascend, transformers",
                perplexity="30.66",
                ptq={**_W8A8, "act_quant_granularity": "per_token"},
            ),
            Preset(
                name="w8a8",
                about="int8 weights, int8 activations with one scale from calibration; SmoothQuant, clipped weights; "
                "linears that a scale for all tokens would destroy stay in float",
                cost="a forward pass and searches of ranges",
                loads="vLLM, vLLM-Ascend, vLLM-MindSpore, transformers",
                perplexity="30.51 without a limit on what a token loses",
                ptq=_W8A8,
                # One step for all tokens rounds most of them to zero where a few are enormous, as in a layer or two of
                # many models (SmolLM2's layer 11), and whoever names a scheme has not looked at layers.
                more={"on_bad_layer": "keep_float"},
            ),
            Preset(
                name="w8a16",
                about="int8 weights, activations as they are",
                cost="a forward pass",
                loads="vLLM on CUDA, vLLM-Ascend, transformers",
                perplexity="30.38",
                ptq={"weight_quant_dtype": "int8"},
            ),
            Preset(
                name="w4a16",
                about="int4 weights in groups, activations as they are; AWQ's scales, GPTQ's rounding",
                cost="a forward pass, Gram matrices and long solves",
                loads="vLLM on CUDA, transformers",
                perplexity="32.45",
                ptq={**_W4, "outliers_suppression": "awq"},
                grouped=True,
            ),
            Preset(
                name="w4a8",
                about="int4 weights in groups, int8 activations with a scale for each token; GPTQ",
                cost="a forward pass, Gram matrices and solves",
                loads="transformers",
                perplexity="34.35",
                ptq={**_W4, "act_quant_dtype": "int8", "act_quant_granularity": "per_token"},
                grouped=True,
            ),
            Preset(
                name="auto",
                about="4, 8 or 16 bits for each linear within 30 % of their bytes; AWQ and GPTQ where there are 4",
                cost="a forward pass, Gram matrices and long solves",
                loads="vLLM on CUDA, transformers",
                perplexity="32.22 at 15 % of float32",
                ptq={**_W4, "outliers_suppression": "awq"},
                grouped=True,
                more={"bits": "auto", "size_budget": 0.30},
            ),
        )
    }
)
"""Name to preset, the cheapest to serve first."""


def find_preset(name: str) -> Preset:
    """The preset of that name; case does not matter, nor whether words are joined by `-` or `_`.

    Raises:
        RecipeError: there is none.
    """
    plain = name.lower().replace("_", "-")
    if plain in PRESETS:
        return PRESETS[plain]
    near = difflib.get_close_matches(plain, PRESETS, n=1, cutoff=0.4)
    meant = f"do you mean {near[0]}? " if near else ""
    raise RecipeError(f"--scheme: {name!r:.60} is not a scheme; {meant}Schemes are {', '.join(PRESETS)}")
