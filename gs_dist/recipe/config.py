"""The recipe: everything a job is told, checked before anything is loaded.

A recipe is one YAML file (see `jobs/recipes/`). Unknown keys, wrong types and contradictions are
refused together, each with its key path, what was found and what to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from gs_dist.errors import RecipeError
from gs_dist.model.sketch import DEFAULT_ROWS
from gs_dist.recipe.bits import contradictions
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.keys import Values
from gs_dist.recipe.pattern import compiled_of_recipe
from gs_dist.recipe.places import fault_of_directory, fault_of_output
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.recipe.sizes import SIZE_HELP, parse_size
from gs_dist.recipe.text import Document, apply_overrides, parse_document, problems_of, report
from gs_dist.seal import unsealed_text
from gs_dist.wording import is_uri, without_secrets

__all__ = [
    "CalibrationConfig",
    "CalibrationData",
    "PTQSection",
    "ParallelConfig",
    "ProbeConfig",
    "base_name",
    "config_of",
    "load_recipe",
    "published_recipe",
    "read_published_recipe",
    "recipe_fingerprint",
]

# Tokens of a micro-batch where the recipe leaves its size open: enough for matrix products to run at full
# rate, little enough that attention scores of one layer stay small. It must not depend on the cluster.
AUTO_MICRO_BATCH_TOKENS = 2048


def _refusal(write: str) -> PydanticCustomError:
    """An error that `gs_dist.recipe.text` prints as `found ...; write ...`."""
    return PydanticCustomError("recipe", "write {write}", {"write": write})


def _size_or_auto(value: object) -> object:
    if value == "auto":
        return value
    try:
        return parse_size(value)
    except ValueError:
        raise _refusal(f"auto, or {SIZE_HELP}") from None


def _share_or_size(value: object) -> object:
    if value is None or (isinstance(value, float) and 0.0 < value < 1.0):
        return value
    try:
        return parse_size(value)
    except ValueError:
        raise _refusal(f"a share between 0 and 1 such as 0.30, or {SIZE_HELP}") from None


def _count_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise _refusal("auto, or a whole number from 1")


def _power_of_two(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 and value & (value - 1) == 0:
        return value
    raise _refusal("a power of two: 1, 2, 4, 8, 16 ...")


def _one_or_more(value: object) -> object:
    """A text where a list is meant is a list of one."""
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, (list, tuple)) and entries and all(isinstance(e, str) and e.strip() for e in entries):
        return tuple(entries)
    raise _refusal("a text, or a list of texts")


def _none_or_more(value: object) -> object:
    try:
        return None if value is None else _one_or_more(value)
    except PydanticCustomError:
        raise _refusal("a text, a list of texts, or null for the calibration data") from None


def _list_of_names(value: object) -> object:
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) and entry for entry in value):
        return tuple(value)
    raise _refusal("a list of parts of names, such as [lm_head]")


def _dialects(value: object) -> object:
    entries = _one_or_more(value)
    assert isinstance(entries, tuple)
    if any(entry not in DIALECTS for entry in entries) or len(set(entries)) != len(entries):
        raise _refusal(f"one or more of {', '.join(DIALECTS)}, each once")
    return entries


def _switch(value: object) -> object:
    """YAML reads a bare `on` and `off` as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
SizeOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_size_or_auto), Values(f"{SIZE_HELP}, or auto")]
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Values("text, or a list of texts")]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    # Each field's docstring is what `gs-dist recipe` says of it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class CalibrationData(_Section):
    """What the statistics are taken from. `data` holds files, directories, glob patterns or URIs."""

    data: Texts
    """Files, directories, patterns or URIs: Parquet, Arrow, JSON lines, JSON, CSV, text, or what save_to_disk wrote."""
    num_samples: Count = 128
    """How many samples statistics are taken from."""
    sequence_length: Count = 2048
    """Tokens of a sample."""
    column: Text = "auto"
    """Column of token ids, text or chats, field in structs (doc.text), or pair (prompt+response); auto: a usual one."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a plain text file is: a line, the lines up to an empty one, or the file."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own, such as BOS, to text; chats have those that the chat template writes."""
    strict: bool = False
    """Refuses rows that are null or hold an empty chat; otherwise they are passed over and counted."""
    seed: int | None = None
    """Takes rows from all over the data by this seed; with null, the first ones."""
    packing: bool = True
    """Joins rows and cuts samples of full length; otherwise a row is a sample, cut or padded."""
    micro_batch_size: CountOrAuto = "auto"
    """Samples that go through a layer at once; auto takes as many as make about 2048 tokens."""
    reduction_blocks: Annotated[int, BeforeValidator(_power_of_two), Values("a power of two")] = 8
    """Parts that statistics are summed in, in a fixed order: as many replicas as these can share work."""

    @property
    def samples_per_micro_batch(self) -> int:
        """`micro_batch_size` with `auto` resolved; depends on the data's settings alone."""
        if self.micro_batch_size != "auto":
            return min(self.micro_batch_size, self.num_samples)
        return min(max(1, AUTO_MICRO_BATCH_TOKENS // self.sequence_length), self.num_samples)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the whole job; the last may hold fewer samples."""
        return math.ceil(self.num_samples / self.samples_per_micro_batch)

    @property
    def num_blocks(self) -> int:
        """`reduction_blocks`, or as few as hold a micro-batch each: halving those again leaves the order of sums."""
        return min(self.reduction_blocks, 1 << (self.num_micro_batches - 1).bit_length())

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole job, padding included."""
        return self.num_samples * self.sequence_length


class ParallelConfig(_Section):
    """How the job is spread; nothing here changes the published bytes. `memory_per_worker` is in bytes."""

    pipeline_parallel_size: CountOrAuto = "auto"
    """Stages: each has a share of the layers."""
    data_parallel_size: CountOrAuto = "auto"
    """Replicas of the stages: each runs a share of the samples."""
    memory_per_worker: SizeOrAuto = "auto"
    """The most memory of its device that a worker may use; auto is its share of the node, or of a card."""
    device: Literal["auto", "cpu", "ascend"] = "auto"
    """What workers compute on; auto takes Ascend cards where there are any."""
    threads_per_worker: CountOrAuto = "auto"
    """CPU threads of a worker; auto divides the cores."""
    layers_per_wave: CountOrAuto = "auto"
    """Layers of a stage that are observed in one pass; auto takes as many as fit into memory."""
    max_in_flight: CountOrAuto = "auto"
    """Micro-batches under way between the first and the last stage: more wait less and take more memory."""
    min_data_parallel_size: Count = 1
    """Replicas that suffice to start or go on with, where the cluster has no room for all."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row lost workers are started again without a layer finished in between."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds without any progress after which workers count as lost."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> ParallelConfig:
        if self.data_parallel_size != "auto" and self.min_data_parallel_size > self.data_parallel_size:
            raise ValueError(
                f"min_data_parallel_size is {self.min_data_parallel_size} while data_parallel_size is "
                f"{self.data_parallel_size}: set min_data_parallel_size: {self.data_parallel_size} or less"
            )
        return self


class ProbeConfig(_Section):
    """What float and published model are compared on where `max_perplexity_increase` is set; decides no byte.

    `data` is as in `calibration`, None for the calibration data; the first `num_samples` samples are taken, or
    as many as there are. The float model generates `max_new_tokens` tokens after the beginning of the first (0: none),
    and the published model is asked for its own at each of these places.
    """

    data: Annotated[
        tuple[str, ...] | None, BeforeValidator(_none_or_more), Values("text, a list of texts, or null")
    ] = None
    """Data to compare the models on, as in calibration.data; null takes the calibration data."""
    num_samples: Count = 8
    """How many samples at most."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 16
    """Tokens that the float model generates for the published one to be compared on; 0 for none."""


class PTQSection(QuantPolicy):
    """The policy of linears that no layer policy matches, and parts of names that stay as they are."""

    opname_blacklist: Annotated[tuple[str, ...], BeforeValidator(_list_of_names), Values("a list of texts")] = ()
    """Parts of names of linears that stay in float, such as lm_head."""

    @property
    def policy(self) -> QuantPolicy:
        """The same without the blacklist."""
        return QuantPolicy(**self.written_fields())

    def written_fields(self) -> dict[str, Any]:
        """The policy's fields that the recipe sets, for layer policies to be laid over."""
        return self.model_dump(exclude_unset=True, exclude={"opname_blacklist"})


def _merged_policy(ptq: PTQSection, override: Mapping[str, Any]) -> QuantPolicy:
    """`override` laid over `ptq`, `algo_args` key by key."""
    base = ptq.written_fields()
    merged = {**base, **override}
    if isinstance(override.get("algo_args"), Mapping):
        merged["algo_args"] = {**base.get("algo_args", {}), **override["algo_args"]}
    return QuantPolicy.model_validate(merged)


class CalibrationConfig(_Section):
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
    format: Annotated[tuple[str, ...], BeforeValidator(_dialects), Values(f"one or more of {', '.join(DIALECTS)}")] = (
        "compressed-tensors",
    )
    """Forms the model is published in, each in a directory of its own."""
    serving_dtype: Literal["float16", "bfloat16"] | None = None
    """Dtype that the model is served in, which decides how scales are stored; null is the checkpoint's own. Ascend 310P
    cards serve float16 alone."""
    gram: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
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
        float | int | None, BeforeValidator(_share_or_size), Values(f"a share such as 0.30, {SIZE_HELP}, or null")
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
            raise _refusal(fault)
        return os.path.expanduser(value)

    @field_validator("model", mode="after")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        fault = fault_of_directory(value)
        if fault is not None:
            raise _refusal(fault)
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
            errors.append(InitErrorDetails(type=_refusal(write), loc=(pattern,), input=pattern))
        if isinstance(override, Mapping):
            errors += _override_errors(pattern, override, ptq)
        elif override is not None:
            write = "a table of options to lay over ptq, or null to leave the linears alone"
            errors.append(InitErrorDetails(type=_refusal(write), loc=(pattern,), input=override))
    return errors


def _override_errors(pattern: str, override: Mapping[str, Any], ptq: PTQSection | None) -> list[InitErrorDetails]:
    try:
        _merged_policy(ptq or PTQSection(), override)
    except ValidationError as error:
        return [
            InitErrorDetails(
                type=_refusal(detail["ctx"]["write"]) if detail["type"] == "recipe" else detail["type"],
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
