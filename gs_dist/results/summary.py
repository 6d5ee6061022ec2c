"""What a finished job says of itself: every linear, every worker, as JSON and as a Parquet table.

Nothing in it tells on which machine it was made: no host names, no paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gs_dist.errors import OutputError
from gs_dist.results.quantized import LinearSummary
from gs_dist.seal import sealed, unsealed
from gs_dist.storage import rename, sync_directory, sync_file

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CalibrationSummary",
    "FloatComparison",
    "PerplexitySummary",
    "ProbeSummary",
    "StageSummary",
    "evaluations_json",
    "read_summary",
    "table_sha256",
    "write_summary",
]

SUMMARY_VERSION = 1
JSON_NAME = "summary.json"
PARQUET_NAME = "summary.parquet"
_FILES = "files"  # beside the summary, with their hashes

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One worker: layers [first_layer, end_layer), busy time, the share of its time it waited, peak memory in bytes.

    `account` tells the busy seconds by kind of work: load, pass, partial sums, solve, write.
    """

    stage: int
    replica: int
    first_layer: int
    end_layer: int
    seconds: float
    idle_share: float
    peak_memory_planned: int
    peak_memory_measured: int | None
    account: Mapping[str, float] = field(default_factory=dict)

    @property
    def idle_seconds(self) -> float:
        """How long it waited; 0 where it did nothing else, and nobody knows for how long."""
        return self.seconds * self.idle_share / (1.0 - self.idle_share) if self.idle_share < 1.0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ProbeSummary:
    """A published model beside the float model, before the job counted as done.

    Attributes:
        format: the dialect.
        perplexity, float_perplexity: of the two models.
        num_samples, num_tokens: samples, and tokens predicted in them.
        calibration_data: whether the samples are of the calibration data.
        num_new_tokens: tokens that the float model generated, each its most likely one.
        num_equal_tokens: how many of them, before the first that is not, are the published model's most likely ones
            too: as many as it would have generated alike by itself.
    """

    format: str
    perplexity: float
    float_perplexity: float
    num_samples: int
    num_tokens: int
    calibration_data: bool
    num_new_tokens: int
    num_equal_tokens: int

    @property
    def increase(self) -> float:
        """Of the perplexity, as a share of the float model's."""
        return self.perplexity / self.float_perplexity - 1

    def sentence(self) -> str:
        """The figures in words, without the format."""
        source = "the calibration data" if self.calibration_data else "other data"
        generated = (
            f"; {self.num_equal_tokens} of {self.num_new_tokens} generated tokens equal before the first difference"
        )
        return (
            f"perplexity {self.perplexity:.4g}, of the float model {self.float_perplexity:.4g} ({self.increase:+.2%}), "
            f"over {self.num_samples} samples of {source} ({self.num_tokens} predicted tokens)"
            f"{generated if self.num_new_tokens else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class FloatComparison:
    """How far a published model is from the float model, token by token over the same samples.

    Attributes:
        loss_increase: by how much the mean loss of a predicted token is larger, in nats.
        standard_error: of that, from the differences of samples; None of a single sample.
        mean_kl, kl_99th_percentile: of KL(float || published) of the next token's distribution, in nats.
        equal_top1: share of predicted places where both models have the same most likely token.
    """

    loss_increase: float
    standard_error: float | None
    mean_kl: float
    kl_99th_percentile: float
    equal_top1: float

    def rows(self) -> tuple[tuple[str, str], ...]:
        """What is measured and the figure, for people."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.5f}"
        return (
            ("loss increase ± paired standard error, nats", f"{self.loss_increase:+.5f}{error}"),
            ("KL divergence from the float model, mean, nats", f"{self.mean_kl:.5f}"),
            ("KL divergence, 99th percentile, nats", f"{self.kl_99th_percentile:.5f}"),
            ("most likely token the same", f"{self.equal_top1:.2%}"),
        )


@dataclass(frozen=True, kw_only=True)
class PerplexitySummary:
    """What `gs-dist evaluate` measured of a published model.

    Attributes:
        format: the dialect.
        perplexity, float_perplexity: of the published and of the float model, None where that was not named.
        num_samples, sequence_length, num_tokens: samples, tokens of each, and tokens predicted in all of them.
        data: base names of what the samples were read from.
        data_fingerprint: of the samples, sha256 in hex: equal where two figures may be compared.
        comparison: with the float model, None where that was not run.
        engine: the one that rounds tokens as it was done here; None for compressed-tensors' way.
    """

    format: str
    perplexity: float
    float_perplexity: float | None
    num_samples: int
    sequence_length: int
    num_tokens: int
    data: tuple[str, ...]
    data_fingerprint: str
    comparison: FloatComparison | None = None
    engine: str | None = None

    def sentence(self) -> str:
        """The figures and what they are over, in words, without the format."""
        change = ""
        if self.float_perplexity is not None:
            increase = self.perplexity / self.float_perplexity - 1
            change = f", of the float model {self.float_perplexity:.4g} ({increase:+.2%})"
        return f"perplexity {self.perplexity:.4g}{change}, over {self.basis()}"

    def basis(self) -> str:
        """What the figures are over."""
        return (
            f"{self.num_samples} samples of {self.sequence_length} tokens of {', '.join(self.data)} "
            f"({self.num_tokens} predicted tokens, data {self.data_fingerprint[:12]})"
            f"{'' if self.engine is None else f', tokens rounded as {self.engine} does'}"
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationSummary:
    """A job's summary.

    Attributes:
        model: base name of the model's directory.
        formats: dialects written.
        propagation: which output was passed from layer to layer, "original" or "quantized".
        num_samples, num_tokens: calibration samples, and their tokens without padding.
        seconds: wall time of the job.
        versions: package to version.
        fingerprints: of recipe, source checkpoint and samples, sha256 in hex.
        rows: one a linear, layer by layer, the head last.
        stages: one a worker.
        notes: what a person should know of the run as a whole.
        probes: one a format, where the job was to compare what it published with the float model.
        evaluations: the last one of each format that was evaluated since.
        source_bytes: of the float model's tensors; None where it was not noted.
        model_bytes: of the weight files of each published format, by dialect.
    """

    model: str
    formats: tuple[str, ...]
    propagation: str
    num_samples: int
    num_tokens: int
    seconds: float
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    rows: tuple[LinearSummary, ...]
    stages: tuple[StageSummary, ...]
    notes: tuple[str, ...] = field(default=())
    probes: tuple[ProbeSummary, ...] = ()
    evaluations: tuple[PerplexitySummary, ...] = ()
    source_bytes: int | None = None
    model_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_data(self) -> bool:
        """Whether samples were seen; of a conversion none were, and errors are of weights."""
        return self.num_samples > 0

    @property
    def strategies(self) -> dict[str, int]:
        """Strategy to number of linears, the commonest first; `NA` stands for those left as they are."""
        return dict(Counter(row.strategy for row in self.rows).most_common())

    def with_evaluations(self, measured: Sequence[PerplexitySummary]) -> CalibrationSummary:
        """The same with what was measured in place of earlier figures of the same formats.

        A figure of the float model that was not measured again is taken from an earlier one over the same samples.
        """
        floats = {known.data_fingerprint: known.float_perplexity for known in self.evaluations}
        latest = {known.format: known for known in self.evaluations}
        for found in measured:
            known_float = floats.get(found.data_fingerprint)
            latest[found.format] = (
                found if found.float_perplexity is not None else replace(found, float_perplexity=known_float)
            )
        order = {name: position for position, name in enumerate(self.formats)}
        ordered = sorted(latest.values(), key=lambda found: order.get(found.format, len(order)))
        return replace(self, evaluations=tuple(ordered))

    def sorted_rows(self, order: str = "layer") -> list[LinearSummary]:
        """Rows in model order (`layer`), or the largest number first; rows without one come last.

        `error` sorts by the larger of the errors over all tokens and of the median one, `sensitivity` by what the
        costliest scheme would cost.

        Raises:
            ValueError: another order.
            OutputError: nothing is known to sort by.
        """
        if order == "layer":
            return list(self.rows)
        if order == "error":
            return sorted(self.rows, key=lambda row: math.inf if row.largest_error is None else -row.largest_error)
        if order == "sensitivity":
            if not any(row.scheme_errors for row in self.rows):
                raise OutputError(
                    "the run did not find out what schemes cost, so that there is no order by sensitivity: run the "
                    "recipe with sensitivity: true; from the statistics of a job with --keep-statistics, `gs-dist "
                    "resolve` does so without running the model"
                )
            return sorted(self.rows, key=lambda row: -max((row.scheme_errors or {}).values(), default=-math.inf))
        raise ValueError(f"rows cannot be sorted by {order!r}: ask for 'layer', 'error' or 'sensitivity'")

    def to_arrow(self) -> pa.Table:
        """One row a linear, as in summary.parquet; `.to_pandas()` makes a data frame of it."""
        return _table(self)

    def to_json(self) -> str:
        """As JSON text, keys in a fixed order; numbers that are not finite become null."""
        return _as_json(self.to_document())

    def to_document(self) -> dict[str, Any]:
        """What `to_json` writes."""
        document = json.loads(_as_json({"version": SUMMARY_VERSION, **dataclasses.asdict(self)}))
        return dict(document)

    @classmethod
    def from_json(cls, text: str) -> CalibrationSummary:
        """Inverse of `to_json`.

        Raises:
            OutputError: not a summary, or one of a later version.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _no_summary(error) from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Any) -> CalibrationSummary:
        """Inverse of `to_document`.

        Raises:
            OutputError: as of `from_json`.
        """
        _refuse_other_version(document)
        # Perplexities were once written without format and samples: no figures.
        known = {n: v for n, v in document.items() if n not in ("version", "perplexity", "float_perplexity")}
        try:
            rows = tuple(_rebuilt(LinearSummary, row) for row in known.pop("rows"))
            stages = tuple(_rebuilt(StageSummary, stage) for stage in known.pop("stages"))
            probes = tuple(_rebuilt(ProbeSummary, probe) for probe in known.pop("probes", ()))
            found = tuple(_rebuilt_evaluation(entry) for entry in known.pop("evaluations", ()))
            parts = {"rows": rows, "stages": stages, "probes": probes, "evaluations": found}
            return _rebuilt(cls, {**known, **parts})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _no_summary(error) from error


def _no_summary(reason: object) -> OutputError:
    return OutputError(f"{JSON_NAME} is not a summary ({reason}): run the job again to rewrite it")


def _refuse_other_version(document: Any) -> None:
    if not isinstance(document, dict) or "version" not in document:
        raise _no_summary("no version in it")
    if document["version"] != SUMMARY_VERSION:
        raise OutputError(
            f"{JSON_NAME} has version {document['version']!r:.40} and this gs-dist reads version {SUMMARY_VERSION}: "
            "use the gs-dist that wrote it"
        )


def _as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(_finite(document), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, (list, tuple)) else value


def _rebuilt(kind: Callable[..., Row], values: Mapping[str, Any]) -> Row:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _rebuilt_evaluation(values: Mapping[str, Any]) -> PerplexitySummary:
    comparison = values.get("comparison")
    made = None if comparison is None else FloatComparison(**comparison)
    return _rebuilt(PerplexitySummary, {**values, "comparison": made})


def evaluations_json(found: Sequence[PerplexitySummary]) -> str:
    """As JSON text, one object a format; numbers that are not finite become null."""
    return json.dumps(_finite([dataclasses.asdict(entry) for entry in found]), indent=1, ensure_ascii=False) + "\n"


def write_summary(directory: Path, summary: CalibrationSummary) -> None:
    """Writes summary.parquet with one row a linear, and summary.json, each in one step.

    summary.json holds the table's hash too, and a checksum of itself.

    Raises:
        OutputError: the directory cannot be written.
    """
    try:
        _publish(directory / PARQUET_NAME, lambda path: _write_parquet(path, summary))
        table = hashlib.sha256((directory / PARQUET_NAME).read_bytes()).hexdigest()
        text = _as_json(sealed({**summary.to_document(), _FILES: {PARQUET_NAME: {"sha256": table}}}))
        _publish(directory / JSON_NAME, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"the summary cannot be written: {error.strerror}; make output writable") from error


def read_summary(directory: Path) -> CalibrationSummary:
    """Reads the summary of a run's output directory.

    Raises:
        OutputError: there is none, or one that is not of this version.
        DamagedError: it does not hold what was written.
    """
    document = _read_document(directory)
    document.pop(_FILES, None)
    return CalibrationSummary.from_document(document)


def table_sha256(directory: Path) -> str:
    """What summary.json says of summary.parquet.

    Raises:
        OutputError: as of `read_summary`.
    """
    try:
        return str(_read_document(directory)[_FILES][PARQUET_NAME]["sha256"])
    except (KeyError, TypeError) as error:
        raise OutputError(f"{JSON_NAME} does not tell the hash of {PARQUET_NAME}: run the job again") from error


def _read_document(directory: Path) -> dict[str, Any]:
    try:
        text = (directory / JSON_NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OutputError(f"{JSON_NAME} is not UTF-8 text: run the job again to rewrite it") from error
    except OSError as error:
        raise OutputError(
            f"{directory} holds no {JSON_NAME} ({error.strerror}): name the output directory of a finished job"
        ) from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_summary(error) from error
    _refuse_other_version(document)
    return unsealed(document, JSON_NAME)


def _write_parquet(path: Path, summary: CalibrationSummary) -> None:
    import pyarrow.parquet as pq

    pq.write_table(summary.to_arrow(), path)


def _table(summary: CalibrationSummary) -> pa.Table:
    import pyarrow as pa  # costs 0.2 s and 60 MB, which reading a summary should not

    schema = pa.schema(
        [
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("strategy", pa.string(), nullable=False),
            pa.field("relative_error", pa.float64()),
            pa.field("error_source", pa.string(), nullable=False),
            pa.field("scale_min", pa.float64()),
            pa.field("scale_max", pa.float64()),
            pa.field("num_tokens", pa.int64(), nullable=False),
            pa.field("notes", pa.list_(pa.string())),
            pa.field("activation_error", pa.float64()),
            pa.field("token_error", pa.float64()),
            pa.field("num_given", pa.int64()),
            pa.field("input_min", pa.float64()),
            pa.field("input_max", pa.float64()),
            pa.field("input_typical", pa.float64()),
            pa.field("outlier_channels", pa.list_(pa.int32())),
            pa.field("zeroed", pa.float64()),
            # Not a map, which `datasets` cannot load.
            pa.field("scheme_errors", pa.list_(pa.struct([("scheme", pa.string()), ("relative_error", pa.float64())]))),
        ],
        metadata=_parquet_metadata(summary),
    )
    rows = [_parquet_row(row) for row in summary.rows]
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)


def _parquet_metadata(summary: CalibrationSummary) -> dict[str, str]:
    """What is said of the run as a whole; perplexities where they were measured."""
    texts = {"model": summary.model, "propagation": summary.propagation, "gs_dist_summary": str(SUMMARY_VERSION)}
    for name, found in (("probes", summary.probes), ("evaluations", summary.evaluations)):
        if found:
            texts[name] = json.dumps(_finite([dataclasses.asdict(entry) for entry in found]))
    return texts


def _parquet_row(row: LinearSummary) -> dict[str, Any]:
    errors = None
    if row.scheme_errors is not None:
        errors = [{"scheme": scheme, "relative_error": error} for scheme, error in row.scheme_errors.items()]
    return {**_finite(dataclasses.asdict(row)), "notes": list(row.notes), "scheme_errors": errors}


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside, flushes to storage and renames, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as stream:
            sync_file(stream.fileno())
            rename(stream.fileno(), beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)
