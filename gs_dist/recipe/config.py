"""The recipe: everything a job is told, checked before anything is loaded.

A recipe is one YAML file (see `jobs/recipes/`). Unknown keys, wrong types and contradictions are
refused together, each with its key path, what was found and what to write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from gs_dist.errors import RecipeError
from gs_dist.model.sketch import DEFAULT_ROWS
from gs_dist.recipe.bits import contradictions
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.keys import Values
from gs_dist.recipe.pattern import compiled_of_recipe
from gs_dist.recipe.places import fault_of_directory, fault_of_output
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.recipe.sections import (
    CalibrationData,
    ParallelConfig,
    ProbeConfig,
    PTQSection,
    Section,
    Text,
    dialect_names,
    on_off,
    refusal,
    share_or_size,
)
from gs_dist.recipe.sizes import SIZE_HELP
from gs_dist.recipe.text import Document, apply_overrides, parse_document, problems_of, report
from gs_dist.seal import unsealed_text
from gs_dist.wording import is_uri, without_secrets

__all__ = [
    "CalibrationConfig",
    "base_name",
    "config_of",
    "load_recipe",
    "published_recipe",
    "read_published_recipe",
    "recipe_fingerprint",
]


def _merged_policy(ptq: PTQSection, override: Mapping[str, Any]) -> QuantPolicy:
    """`override` laid over `ptq`, `algo_args` key by key."""
    base = ptq.written_fields()
    merged = {**base, **override}
    if isinstance(override.get("algo_args"), Mapping):
        merged["algo_args"] = {**base.get("algo_args", {}), **override["algo_args"]}
    return QuantPolicy.model_validate(merged)


class CalibrationConfig(Section):
    """A whole recipe. Frozen; anything derived from the checkpoint or the cluster is in the plan."""

    model: Text
    """Directory of the float model: config.json, safetensors, tokenizer.json where the data is text."""
    output: Text
    """Directory of the job, seen by every node; a job that is submitted again goes on from there."""
    calibration: CalibrationData
    """What the statistics are taken from."""
    ptq: PTQSection = PTQSection()
    """How linears are quantised."""
    layer_policies: Annotated[
        dict[str, dict[str, Any] | None], Values("a table: pattern to keys of ptq, or to null")
    ] = Field(default={}, json_schema_extra={"table": True})
    """Linears with a policy of their own, by regular expressions that match full names from the start."""
    parallel: ParallelConfig = ParallelConfig()
    """How the job is spread; nothing here changes the published bytes."""
    format: Annotated[
        tuple[str, ...], BeforeValidator(dialect_names), Values(f"one or more of {', '.join(DIALECTS)}")
    ] = ("compressed-tensors",)
    """Forms the model is published in, each in a directory of its own."""
    serving_dtype: Literal["float16", "bfloat16"] | None = None
    """Dtype that the model is served in, which decides how scales are stored; null is the checkpoint's own. Ascend 310P
    cards serve float16 alone."""
    gram: Annotated[Literal["auto", "on", "off"], BeforeValidator(on_off)] = "auto"
    """What errors are reported and searched from: auto takes sketches, on whole Gram matrices, off only what a solver
    must have. GPTQ takes a Gram matrix anyway."""
    sketch_rows: Annotated[int, Field(ge=16, le=65536)] = DEFAULT_ROWS
    """Rows of a sketch; an input with no more channels than that has its Gram matrix taken. More are more exact."""
    propagation: Literal["original", "quantized"] = "original"
    """What a layer's input is: outputs of the original layers before it, or of the quantised ones."""
    max_relative_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.5
    """Relative output error from which a linear counts as destroyed (1: it might as well return zeros)."""
    max_token_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.5
    """The same for the median token of a sample: errors over all tokens may belong to a few of enormous energy."""
    on_bad_layer: Literal["fail", "keep_float"] = "fail"
    """What becomes of a linear past max_relative_error or max_token_error: the job fails, or it stays in float."""
    max_perplexity_increase: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Runs the published model beside the float one and fails past this increase (0.05: 5 %)."""
    probe: ProbeConfig = ProbeConfig()
    """What they are compared on where max_perplexity_increase is set."""
    keep_statistics: bool = False
    """Keeps the statistics in the output, for `gs-dist resolve` with another recipe."""
    bits: Literal["fixed", "auto"] = "fixed"
    """auto chooses 4, 8 or 16 bits for each linear within size_budget."""
    size_budget: Annotated[
        float | int | None, BeforeValidator(share_or_size), Values(f"a share such as 0.30, {SIZE_HELP}, or null")
    ] = None
    """What the layers' linears may take with bits: auto; a share is of what they take in float."""
    sensitivity: bool = False
    """Finds out what 8 and 4 bits would cost each linear, for `gs-dist summary --sort sensitivity`."""

    @property
    def dialects(self) -> tuple[str, ...]:
        """Names of the dialects to publish, as `format` lists them."""
        return self.format

    @property
    def network_policy(self) -> QuantPolicy:
        """The policy of every linear that no layer policy matches."""
        return self.ptq.policy

    @property
    def resolved_layer_policies(self) -> dict[str, QuantPolicy | None]:
        """Pattern to whole policy, overrides laid over `ptq`; None leaves the linears alone."""
        return {pattern: self.policy_with(override) for pattern, override in self.layer_policies.items()}

    @property
    def judges_schemes(self) -> bool:
        """Whether it is found out what W8 and W4 cost each linear."""
        return self.sensitivity or self.bits == "auto"

    @property
    def probe_data(self) -> CalibrationData:
        """The probe's samples, cut like the calibration's and in micro-batches no larger than its."""
        data, own = self.calibration, self.probe.data
        count = self.probe.num_samples if own else min(self.probe.num_samples, data.num_samples)
        batch = data.samples_per_micro_batch
        return data.model_copy(update={"data": own or data.data, "num_samples": count, "micro_batch_size": batch})

    def policy_with(self, override: Mapping[str, Any] | None) -> QuantPolicy | None:
        """Policy of an entry of `layer_policies`: `override` laid over `ptq`, None for None."""
        return None if override is None else _merged_policy(self.ptq, override)

    @property
    def takes_gram(self) -> bool:
        """Whether errors are reported from second moments even where no solver needs them."""
        return self.gram != "off"

    @property
    def taken_sketch_rows(self) -> int:
        """Rows of the sketches that stand for Gram matrices; 0 where the matrices are taken."""
        return 0 if self.gram == "on" else self.sketch_rows

    @field_validator("output", mode="after")
    @classmethod
    def _refuse_output_in_model(cls, value: str, info: ValidationInfo) -> str:
        fault = fault_of_output(value, info.data.get("model"))
        if fault is not None:
            raise refusal(fault)
        return os.path.expanduser(value)

    @field_validator("model", mode="after")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        fault = fault_of_directory(value)
        if fault is not None:
            raise refusal(fault)
        return os.path.expanduser(value)

    @field_validator("layer_policies", mode="before")
    @classmethod
    def _refuse_bad_policies(cls, value: object, info: ValidationInfo) -> object:
        errors = _policy_errors(value, info.data.get("ptq")) if isinstance(value, Mapping) else []
        if errors:
            raise ValidationError.from_exception_data("layer_policies", errors)
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> CalibrationConfig:
        problems = []
        if self.max_perplexity_increase is None and self.probe != ProbeConfig():
            problems.append(
                "probe is set while max_perplexity_increase is null, so that nothing is probed: set "
                "max_perplexity_increase: 0.05 or another share, or leave probe out"
            )
        if self.judges_schemes and self.gram == "off":
            asked = "bits is auto" if self.bits == "auto" else "sensitivity is true"
            problems.append(f"{asked} while gram is off, and schemes are judged by what it takes: set gram: auto")
        if self.bits == "auto":
            problems += contradictions(
                self.ptq,
                size_budget=self.size_budget,
                pinned=[pattern for pattern, override in self.layer_policies.items() if override is not None],
                propagation=self.propagation,
                on_bad_layer=self.on_bad_layer,
            )
        elif self.size_budget is not None:
            problems.append("size_budget is set while bits is fixed: set bits: auto, or leave size_budget out")
        problems += self._unread_arguments()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _unread_arguments(self) -> list[str]:
        """Arguments that the recipe sets and that no algorithm it turns on reads."""
        policies = [self.network_policy, *self.resolved_layer_policies.values()]
        unread = [policy.unread_arguments(self.ptq.algo_args) for policy in policies if policy]
        found = {f"ptq.algo_args.{name}": on for name, on in unread[0].items() if all(name in u for u in unread)}
        for pattern, override in self.layer_policies.items():
            policy = self.policy_with(override)
            if policy is not None and override is not None:
                own = policy.unread_arguments(AlgoArgs(**(override.get("algo_args") or {})))
                found |= {f"layer_policies.{pattern}.algo_args.{name}": on for name, on in own.items()}
        return [f"{name} is set and nothing reads it: set {on}, or leave it out" for name, on in found.items()]

    def anchored(self) -> CalibrationConfig:
        """The same with relative paths made absolute, for workers whose working directory is another; URIs stay."""
        data, own = _anchored(self.calibration.data), self.probe.data
        return self.model_copy(
            update={
                "model": os.path.abspath(self.model),
                "output": os.path.abspath(self.output),
                "calibration": self.calibration.model_copy(update={"data": data}),
                "probe": self.probe.model_copy(update={"data": None if own is None else _anchored(own)}),
            }
        )

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything that decides the published bytes, given the checkpoint and the samples.

        Where data, model and output lie, how the job is spread and how the result is probed is left out; `auto`
        is resolved, and the order of layer policies does not count.
        """
        data = self.calibration.model_dump(mode="json", exclude={"data", "micro_batch_size", "strict"})
        policies = {
            pattern: None if policy is None else policy.model_dump(mode="json")
            for pattern, policy in self.resolved_layer_policies.items()
        }
        return {
            "calibration": {**data, "micro_batch_size": self.calibration.samples_per_micro_batch},
            "ptq": self.network_policy.model_dump(mode="json"),
            "opname_blacklist": sorted(self.ptq.opname_blacklist),
            "layer_policies": policies,
            "format": sorted(self.format),
            "gram": self.takes_gram,
            "sketch_rows": self.taken_sketch_rows,
            "propagation": self.propagation,
            "max_relative_error": self.max_relative_error,
            "max_token_error": self.max_token_error,
            "on_bad_layer": self.on_bad_layer,
            **({"bits": "auto", "size_budget": self.size_budget} if self.bits == "auto" else {}),
            **({"serving_dtype": self.serving_dtype} if self.serving_dtype is not None else {}),
        }


def _anchored(data: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry if is_uri(entry) else os.path.abspath(entry) for entry in data)


def _policy_errors(policies: Mapping[Any, Any], ptq: PTQSection | None) -> list[InitErrorDetails]:
    """What is wrong with layer policies; with a broken `ptq` (None), only what is wrong whatever `ptq` says."""
    errors: list[InitErrorDetails] = []
    for pattern, override in policies.items():
        if not isinstance(pattern, str):
            continue  # refused as a key that is not text
        try:
            compiled_of_recipe(pattern)
        except ValueError as error:
            write = f"a regular expression: {error}"
            errors.append(InitErrorDetails(type=refusal(write), loc=(pattern,), input=pattern))
        if isinstance(override, Mapping):
            errors += _override_errors(pattern, override, ptq)
        elif override is not None:
            write = "a table of options to lay over ptq, or null to leave the linears alone"
            errors.append(InitErrorDetails(type=refusal(write), loc=(pattern,), input=override))
    return errors


def _override_errors(pattern: str, override: Mapping[str, Any], ptq: PTQSection | None) -> list[InitErrorDetails]:
    try:
        _merged_policy(ptq or PTQSection(), override)
    except ValidationError as error:
        return [
            InitErrorDetails(
                type=refusal(detail["ctx"]["write"]) if detail["type"] == "recipe" else detail["type"],
                loc=(pattern, *detail["loc"]),
                input=detail["input"],
                ctx=detail.get("ctx", {}),
            )
            for detail in error.errors(include_url=False)
            if detail["loc"] or ptq is not None
        ]
    return []


def recipe_fingerprint(config: CalibrationConfig, **more: str) -> str:
    """sha256 of `fingerprint_fields` and of `more` (fingerprints of the checkpoint, of the samples), in hex."""
    fields = {**config.fingerprint_fields(), **more}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def base_name(path: str) -> str:
    """The last part of a path or URI, without the query that may hold keys."""
    plain = without_secrets(path).removesuffix("?***")
    return plain.rstrip("/").rsplit("/", 1)[-1].removeprefix("***@") or "."


_PUBLISHED = """\
# The recipe as it was run, with every setting. Directories and files are told by their last part alone, so that nothing
# of the machine is; to run it again give them in full: gs-dist quantize recipe.yaml model=... output=...
# calibration.data=...
"""


def published_recipe(config: CalibrationConfig) -> str:
    """The recipe as YAML with every value spelt out and every path reduced to its last part, which a comment says."""
    document = config.model_dump(mode="json")
    document["model"] = base_name(config.model)
    document["output"] = base_name(config.output)
    document["calibration"]["data"] = [base_name(path) for path in config.calibration.data]
    if config.probe.data is not None:
        document["probe"]["data"] = [base_name(path) for path in config.probe.data]
    return _PUBLISHED + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def read_published_recipe(path: str | os.PathLike[str]) -> CalibrationConfig:
    """What `published_recipe` gave and was sealed in a file; its paths are names, which name nothing by themselves.

    Raises:
        RecipeError: the file cannot be read, or holds what this version does not know.
        DamagedError: it does not hold what was written.
        OutputError: it has no checksum.
    """
    source = Path(path).name
    document = parse_document(unsealed_text(_text_of(path), source), source)
    # Model and output may be of one name, which would be refused as one directory.
    config = config_of(document, ["model=/.gs-dist-no-model"], source=source)
    return config.model_copy(update={"model": str(document["model"])})


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CalibrationConfig:
    """Reads a recipe and lays `key.path=value` overrides over it, values parsed as YAML.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or holds unknown keys, wrong types or
            contradictions; the message lists every problem, one a line.
    """
    source = Path(path).name
    return config_of(parse_document(_text_of(path), source), overrides, source=source)


def _text_of(path: str | os.PathLike[str]) -> str:
    source = Path(path).name
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {source} is not UTF-8 text (byte {error.start}): name a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"recipe {os.fspath(path)} cannot be read: {reason}; name a YAML file") from None


def config_of(document: Document, overrides: Sequence[str] = (), *, source: str) -> CalibrationConfig:
    """The recipe of a parsed document, with overrides as in `load_recipe`; `source` names it in messages.

    Raises:
        RecipeError: likewise.
    """
    document, problems = apply_overrides(document, overrides)
    try:
        config = CalibrationConfig.model_validate(document)
    except ValidationError as error:
        problems += problems_of(error, CalibrationConfig)
        raise report(source, problems) from None
    if problems:
        raise report(source, problems)
    return config
