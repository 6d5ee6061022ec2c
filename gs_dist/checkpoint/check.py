"""Says what a quantised model directory is, and which rule of its dialect or of an engine's loader it breaks.

Nothing is trusted, nothing executed or unpickled; memory is bounded by one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gs_dist.checkpoint.beside import check_files_beside
from gs_dist.checkpoint.converted_comparison import compare_converted
from gs_dist.checkpoint.described_layout import check_scale_biases, described_layout, told_by_description
from gs_dist.checkpoint.dialects import layout_of
from gs_dist.checkpoint.engines import ENGINES, require_known
from gs_dist.checkpoint.engines.kinds import EngineKinds, check_kinds, kinds_of, split_version
from gs_dist.checkpoint.finished_model import run_of_model
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory, take_inventory
from gs_dist.checkpoint.job_end import WAS_REFUSED, told_end
from gs_dist.checkpoint.layout import Layout, build_layout, detect_dialect
from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.output_lock import DONE, LOCK
from gs_dist.checkpoint.part_manifest import finished_parts
from gs_dist.checkpoint.problems import CheckReport, Note, Problem
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_record import read_record
from gs_dist.checkpoint.scale_range import check_scale_range
from gs_dist.checkpoint.source_comparison import compare_with_source
from gs_dist.checkpoint.sources.directory import SourceDirectory
from gs_dist.checkpoint.values import check_tensors
from gs_dist.checkpoint.verification import verify
from gs_dist.errors import UserError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.wording import counted

__all__ = [
    "CheckReport",
    "EngineVerdict",
    "Note",
    "Problem",
    "check",
    "check_all",
    "check_directory",
    "check_forms",
    "judge",
]


def check(directory: Path | str, engine: str | None = None, model: Path | str | None = None) -> CheckReport:
    """`check_directory`, and whether the job whose output the directory lies in is done.

    Args:
        directory: as `check_directory` takes it; or a job's output with one dialect in it.
        engine: likewise.
        model: likewise.

    Raises:
        CheckpointError: `model` is no float model.
        UserError: no such directory, several dialects in it, or an unknown engine; a job that is not finished.
    """
    inner = _model_directory(Path(directory))
    run = run_of_model(inner)
    end = None if run is None else told_end(run)
    if run is not None and end is not None and not inner.is_dir():
        raise UserError(_without_model(run, [inner.name]))
    report = check_directory(inner, engine, model)
    if end is None:
        return report
    problem = Problem(
        file=DONE, tensor="", rule="job-finished", found=f"the job {end}", expected="the model of a job that is done"
    )
    return replace(report, problems=(problem, *report.problems), facts={"job": end, **report.facts})


def check_directory(directory: Path, engine: str | None = None, model: Path | str | None = None) -> CheckReport:
    """Checks a model directory against its own dialect, and against an engine's loader if one is named.

    Files and scales are compared with what provenance.json notes and, where the directory lies in a job's
    output, shards with the manifests' hashes too.

    Args:
        directory: holds config.json and the weights.
        engine: "vllm-ascend", "vllm-mindspore", "vllm", "transformers", "sglang" or "xllm", the first of them with a
            version too, such as "vllm-ascend==0.23"; None for the dialect's rules alone.
        model: the directory of the model that it was made from, of floats, for a converted one also of what it was
            converted from; weights are turned back and compared with it. None leaves that out.

    Raises:
        CheckpointError: `model` is no float model.
        UserError: no such directory, or an unknown engine. Everything else that is wrong comes back as a problem.
    """
    kinds = None if engine is None else _known(engine)
    inventory = take_inventory(directory)
    dialect = detect_dialect(inventory)
    architecture = inventory.architecture
    layout = Layout(dialect=dialect)
    verified, compared = None, None
    if told_by_description(inventory, dialect):
        layout, sound = _check_described(inventory, dialect, engine, kinds)
        verified = verify(inventory, layout, sound)
        if model is not None:
            compared = compare_converted(inventory, layout, sound, SourceDirectory(model))
    elif dialect and architecture is not None:
        rules = layout_of(dialect)
        layout = build_layout(inventory, dialect, rules, architecture)
        sound = check_tensors(inventory, layout)
        rules.check_relations(inventory, layout, sound)
        check_scale_range(inventory, layout, sound)
        check_files_beside(inventory)
        if engine is not None:
            _check_engine(inventory, layout, engine, kinds)
        verified = verify(inventory, layout, sound)
        if model is not None:
            compared = compare_with_source(inventory, layout, rules, sound, CheckpointReader(model))
    problems = sorted(set(inventory.problems), key=lambda p: (p.file, p.tensor, p.rule))
    return CheckReport(
        dialect=dialect,
        engine=engine,
        problems=tuple(problems),
        facts={
            **_facts(inventory, layout, architecture),
            "verified": verified or "no: nothing here says what was published",
            **({} if compared is None else {"source": compared}),
        },
        verified=verified is not None,
        notes=tuple(dict.fromkeys(inventory.notes)),
    )


def check_forms(directory: Path) -> CheckReport:
    """Whether a converted directory's description and headers agree by its dialect's rules; no value is read.

    A conversion carries over whatever its source holds, so that no network says which tensors there may be.

    Raises:
        UserError: no such directory.
    """
    inventory = take_inventory(directory)
    dialect = detect_dialect(inventory)
    layout = _described(inventory, dialect)
    check_tensors(inventory, layout, values=False)
    check_files_beside(inventory)
    facts = _facts(inventory, layout, inventory.architecture)
    problems = tuple(dict.fromkeys(inventory.problems))
    return CheckReport(dialect=dialect, engine=None, problems=problems, facts=facts)


def _described(inventory: Inventory, dialect: str) -> Layout:
    """The layout by the directory's own description, with which config.json is not compared."""
    inventory.problems[:] = [problem for problem in inventory.problems if problem.rule != "config-values"]
    return described_layout(inventory, dialect)


def _known(engine: str) -> EngineKinds | None:
    """What the engine loads from ModelSlim's layout.

    Raises:
        UserError: an unknown engine or version.
    """
    name, _ = split_version(engine)
    kinds = kinds_of(engine)
    if kinds is None and name not in ENGINES:
        known = sorted({*ENGINES, "sglang", "xllm"})
        raise UserError(f"--for {engine}: known engines are {', '.join(known)}")
    if kinds is None:
        require_known(engine)
    return kinds


def _check_engine(inventory: Inventory, layout: Layout, engine: str, kinds: EngineKinds | None) -> None:
    """The rules of the engine's loader; and its registry of kinds where those do not hold for the version."""
    name, version = split_version(engine)
    if name in ENGINES:
        ENGINES[name].check(inventory, layout, version)
    if kinds is not None and (name not in ENGINES or (version and layout.dialect == "ascend")):
        check_kinds(inventory, layout, kinds)


def _check_described(
    inventory: Inventory, dialect: str, engine: str | None, kinds: EngineKinds | None
) -> tuple[Layout, set[str]]:
    """Rules on a directory that is compared with nothing but its own description; the layout, and what is sound."""
    layout = _described(inventory, dialect)
    sound = check_tensors(inventory, layout)
    check_scale_biases(inventory, layout, sound)
    check_files_beside(inventory)
    if kinds is not None and (dialect == "ascend" or kinds.engine != "vllm-ascend"):
        check_kinds(inventory, layout, kinds)
    elif engine is not None:
        model_type = f"{inventory.config.get('model_type')!s:.60}"
        inventory.note(
            "engine-unjudged",
            f"what {engine} makes of {dialect} in a {model_type} is not known here: only the format was checked",
        )
    return layout, sound


@dataclass(frozen=True, kw_only=True)
class EngineVerdict:
    """What an engine's rules say of a directory that is otherwise taken to be sound."""

    engine: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[Note, ...] = ()


def judge(directory: Path, engine: str) -> EngineVerdict:
    """Applies an engine's rules alone, from descriptions and headers; no weight is read.

    Raises:
        UserError: `directory` is not a directory.
    """
    inventory = take_inventory(directory)
    dialect = detect_dialect(inventory)
    if dialect and inventory.architecture is not None:
        layout = build_layout(inventory, dialect, layout_of(dialect), inventory.architecture)
        inventory.problems.clear()  # those of the dialect's own rules
        ENGINES[engine].check(inventory, layout, "")
    return EngineVerdict(
        engine=engine,
        problems=tuple(dict.fromkeys(inventory.problems)),
        notes=tuple(dict.fromkeys(inventory.notes)),
    )


def check_all(
    directory: Path | str, engine: str | None = None, model: Path | str | None = None
) -> dict[str, CheckReport]:
    """`check` of a model directory, or of each one that a job's output holds; by dialect.

    Where an engine is named, dialects that it does not read are left out, unless it reads none of them.

    Raises:
        UserError: as of `check`; a job that is not finished.
    """
    directories = _model_directories(Path(directory))
    reports = {path.name: check(path, engine, model) for path in directories}
    read = {
        name: report
        for name, report in reports.items()
        if all(problem.rule != "engine-format" for problem in report.problems)
    }
    return read or reports


def _model_directories(directory: Path) -> list[Path]:
    """`directory`, or the model directories within a job's output."""
    of_job = (directory / MANIFESTS).is_dir() or (directory / LOCK).is_file()
    if (directory / CONFIG_FILE).is_file() or not of_job:
        return [directory]
    inner = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    record = read_record(directory)
    missing = sorted(set(record.dialects) - {path.name for path in inner}) if record else []
    if missing or not inner:
        raise UserError(_without_model(directory, missing if inner else []))
    return inner


def _without_model(run: Path, missing: Sequence[str]) -> str:
    """Why a job's output holds no model (in dialects that are `missing`, where there is one in another)."""
    end = told_end(run) or "is unfinished"
    again = "" if end.startswith(WAS_REFUSED) else "; submit the same again to go on"
    if parts := finished_parts(run):
        published = f"{counted(len(parts), 'file')} of weights {'is' if len(parts) == 1 else 'are'} published"
        return f"the conversion in {str(run)!r} {end}; {published}{again}"
    record, count = read_record(run), len(list((run / MANIFESTS).glob("layer-*.json")))
    layers = f"{count} of {record.num_layers} layers" if record else f"{count} layers"
    without = f", and there is no model as {' or '.join(missing)} yet" if missing else ""
    return f"the job in {str(run)!r} {end}; {layers} are published{without}{again}"


def _model_directory(directory: Path) -> Path:
    """`directory`, or the one model directory within a job's output."""
    inner = _model_directories(directory)
    if len(inner) > 1:
        names = ", ".join(path.name for path in inner)
        raise UserError(f"{str(directory)!r} holds several formats ({names}): name one of these directories")
    return inner[0]


def _facts(inventory: Inventory, layout: Layout, architecture: DecoderArchitecture | None) -> dict[str, str]:
    """What the directory is, for a reader."""
    facts = {"format": layout.dialect or "unknown"}
    if architecture is not None:
        facts["model"] = f"{architecture.model_type}, {architecture.num_layers} layers, {architecture.dtype}"
        facts["head"] = "tied to the embedding" if architecture.tie_word_embeddings else "of its own"
    else:
        facts["model"] = f"{inventory.config.get('model_type', 'unknown')!s:.60}, by its own description"
    counts = Counter(layout.kinds.values())
    facts["linears"] = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    if layout.kv_layers:
        facts["kv cache"] = f"int8 in {len(layout.kv_layers)} layers"
    nbytes = sum(info.nbytes for info in inventory.tensors.values())
    facts["tensors"] = f"{len(inventory.tensors)} in {len(inventory.files)} files, {nbytes / 1e9:.3f} GB"
    return facts
