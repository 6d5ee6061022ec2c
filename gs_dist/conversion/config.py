"""What a conversion is told, from the command line or from a recipe with `mode: convert`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from gs_dist.recipe.config import base_name
from gs_dist.recipe.keys import Values
from gs_dist.recipe.pattern import compiled_of_recipe
from gs_dist.recipe.places import fault_of_directory, fault_of_output
from gs_dist.recipe.sections import SizeOrAuto
from gs_dist.solvers.integer_rounding import RangeRule
from gs_dist.wording import without_secrets

__all__ = ["ConversionConfig"]

FORMATS = ("compressed-tensors", "ascend")
_PUBLISHED = """\
# The recipe as it was run, with every setting that decides the result. Of directories the model's name alone is told,
# so that nothing of the machine is; to run it again give them: gs-dist convert recipe.yaml model=... output=...
"""


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else value


class ConversionConfig(BaseModel):
    """A conversion. Frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    mode: Literal["convert"] = "convert"
    """Tells a recipe of a conversion from one of a calibration."""
    model: Annotated[str, Field(min_length=1)]
    """Directory of the model, of any type: config.json and safetensors of floats, FP8 blocks, MXFP4 or packed int4."""
    output: Annotated[str, Field(min_length=1)]
    """Directory of the job; a job that is submitted again goes on from there."""
    scheme: Annotated[str, Field(min_length=1), Values("a scheme's name; docs/convert.md has them")] = "W8A8_DYNAMIC"
    """How linears are quantised."""
    group_size: Annotated[int, Field(gt=0)] | None = None
    """Input channels that share a scale in schemes with groups; null for the scheme's own."""
    ranges: RangeRule = "min-max"
    """Ranges of integer weights: whole; or searched for the least squared error, by shares of them or by refitting."""
    layer_policies: Annotated[dict[str, str | None], Values("a table: pattern to a scheme, or to null")] = Field(
        default={}, json_schema_extra={"table": True}
    )
    """Linears with a scheme of their own, or null to leave them alone, by regular expressions on full names."""
    format: Annotated[
        tuple[str, ...],
        BeforeValidator(_one_or_more),
        Field(min_length=1),
        Values(f"one or more of {', '.join(FORMATS)}"),
    ] = ("compressed-tensors",)
    """Forms the model is published in, each in a directory of its own."""
    engine: str | None = None
    """Engine that is to load the result, such as vllm-ascend==0.23 or sglang: what it does not load is refused."""
    max_relative_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.5
    """Lost share of a weight's energy, or of its median input channel's, from which a linear counts as destroyed."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that share the work; auto takes one a core, as far as their memory goes."""
    memory_per_worker: SizeOrAuto = "auto"
    """The most memory that a worker may use; auto takes what the largest weight needs."""

    @field_validator("format", mode="after")
    @classmethod
    def _refuse_unknown_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in FORMATS]
        if unknown or len(set(value)) != len(value):
            raise ValueError(f"write one or more of {', '.join(FORMATS)}, each once; found {', '.join(value)}")
        return value

    @field_validator("model", mode="after")
    @classmethod
    def _refuse_uri(cls, value: str) -> str:
        fault = fault_of_directory(value)
        if fault is not None:
            raise ValueError(f"{without_secrets(value)!r}: write {fault}")
        return value

    @field_validator("layer_policies", mode="after")
    @classmethod
    def _refuse_bad_patterns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for pattern in value:
            try:
                compiled_of_recipe(pattern)
            except ValueError as error:
                raise ValueError(f"{pattern!r} is no pattern of names: {error}") from None
        return value

    @model_validator(mode="after")
    def _refuse_output_in_model(self) -> ConversionConfig:
        fault = fault_of_output(self.output, self.model)
        if fault is not None:
            raise ValueError(f"output {without_secrets(self.output)!r}: write {fault}")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything that decides the published bytes, given the checkpoint."""
        return {
            "mode": "convert",
            "scheme": self.scheme.upper().replace("-", "_"),
            "group_size": self.group_size,
            "ranges": self.ranges,
            "layer_policies": dict(sorted(self.layer_policies.items())),
            "format": sorted(self.format),
        }

    def published(self) -> str:
        """The recipe as YAML, without output and what spread the work, and with the model's name alone."""
        document = self.model_dump(mode="json", exclude={"output", "workers", "memory_per_worker"})
        document["model"] = base_name(self.model)
        return _PUBLISHED + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)

    def fingerprint(self) -> str:
        """sha256 of `fingerprint_fields`, hexadecimal."""
        text = json.dumps(self.fingerprint_fields(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
