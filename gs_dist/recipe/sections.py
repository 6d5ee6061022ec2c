"""The sections of a recipe, and the kinds of values that they take."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.keys import Values
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import SIZE_HELP, parse_size

__all__ = [
    "CalibrationData",
    "PTQSection",
    "ParallelConfig",
    "ProbeConfig",
    "SizeOrAuto",
    "Section",
    "Text",
    "dialect_names",
    "refusal",
    "share_or_size",
    "on_off",
]

# Tokens of a micro-batch where the recipe leaves its size open: enough for matrix products to run at full
# rate, little enough that attention scores of one layer stay small. It must not depend on the cluster.
AUTO_MICRO_BATCH_TOKENS = 2048


def refusal(write: str) -> PydanticCustomError:
    """An error that `gs_dist.recipe.text` prints as `found ...; write ...`."""
    return PydanticCustomError("recipe", "write {write}", {"write": write})


def _size_or_auto(value: object) -> object:
    if value == "auto":
        return value
    try:
        return parse_size(value)
    except ValueError:
        raise refusal(f"auto, or {SIZE_HELP}") from None


def share_or_size(value: object) -> object:
    """A share below 1 or a number of bytes, from a number or a text such as 34GiB; null stays."""
    if value is None or (isinstance(value, float) and 0.0 < value < 1.0):
        return value
    try:
        return parse_size(value)
    except ValueError:
        raise refusal(f"a share between 0 and 1 such as 0.30, or {SIZE_HELP}") from None


def _count_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise refusal("auto, or a whole number from 1")


def _power_of_two(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 and value & (value - 1) == 0:
        return value
    raise refusal("a power of two: 1, 2, 4, 8, 16 ...")


def _one_or_more(value: object) -> object:
    """A text where a list is meant is a list of one."""
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, (list, tuple)) and entries and all(isinstance(e, str) and e.strip() for e in entries):
        return tuple(entries)
    raise refusal("a text, or a list of texts")


def _none_or_more(value: object) -> object:
    try:
        return None if value is None else _one_or_more(value)
    except PydanticCustomError:
        raise refusal("a text, a list of texts, or null for the calibration data") from None


def _list_of_names(value: object) -> object:
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) and entry for entry in value):
        return tuple(value)
    raise refusal("a list of parts of names, such as [lm_head]")


def dialect_names(value: object) -> object:
    """Names of dialects, from one or a list, each once."""
    entries = _one_or_more(value)
    assert isinstance(entries, tuple)
    if any(entry not in DIALECTS for entry in entries) or len(set(entries)) != len(entries):
        raise refusal(f"one or more of {', '.join(DIALECTS)}, each once")
    return entries


def on_off(value: object) -> object:
    """YAML reads a bare `on` and `off` as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
SizeOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_size_or_auto), Values(f"{SIZE_HELP}, or auto")]
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Values("text, or a list of texts")]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A table of a recipe: frozen, and without keys of other names."""

    # Each field's docstring is what `gs-dist recipe` says of it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class CalibrationData(Section):
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


class ParallelConfig(Section):
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


class ProbeConfig(Section):
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
