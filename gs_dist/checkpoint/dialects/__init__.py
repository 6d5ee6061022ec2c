"""Checkpoint dialects of serving engines: a folder each, found by the records of `gs_dist.recipe.dialects`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from gs_dist.checkpoint.dialects.base import Codec, Policies
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.layout import DialectLayout
from gs_dist.errors import RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["Codec", "check_policies", "codec_of", "layout_of", "published_dialect"]


def codec_of(name: str) -> Codec:
    """What writes and reads the dialect of that name in a recipe's `format`; its folder's `codec.CODEC`."""
    codec: Codec = import_module(f"{DIALECTS[name].home}.codec").CODEC
    return codec


def check_policies(name: str, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
    """Refuses what a dialect cannot express, before any work; see `Codec.check_policies`.

    Raises:
        UserError: names the linear and the setting to change.
    """
    codec = codec_of(name)
    for linear, policy in policies.items():
        if policy is not None and policy.quantizes_linear and policy.weight_format not in codec.number_formats:
            held = ", ".join(form.name for form in codec.number_formats)
            others = [other for other in DIALECTS if policy.weight_format in codec_of(other).number_formats]
            instead = f", or format: [{', '.join(others)}]" if others else ""
            raise RecipeError(
                f"{linear}: format {name} cannot hold {policy.weight_format.name} weights: set weight_quant_dtype to "
                f"one of {held}{instead}"
            )
    return codec.check_policies(policies, architecture)


def layout_of(name: str) -> DialectLayout:
    """By what rules a directory of the dialect is checked; its folder's `layout.LAYOUT`, apart from the codec."""
    layout: DialectLayout = import_module(f"{DIALECTS[name].home}.layout").LAYOUT
    return layout


def published_dialect(directory: Path) -> str | None:
    """The dialect that a job published a model directory in; None for one of floats.

    Raises:
        CheckpointError: config.json is damaged.
    """
    for dialect in DIALECTS.values():
        if dialect.description_file is not None and (directory / dialect.description_file).is_file():
            return dialect.name
    if not (directory / "config.json").is_file():
        return None
    quantization = read_json(directory / "config.json", "config.json").get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    told = [dialect for dialect in DIALECTS.values() if dialect.quant_method is not None]
    return next((dialect for dialect in told if dialect.quant_method == method), told[0]).name  # it refuses others
