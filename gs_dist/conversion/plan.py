"""A conversion planned: its parts, how many workers share them, and the memory that bounds each of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.companions import Companions
from gs_dist.checkpoint.engines import require_known
from gs_dist.checkpoint.engines.kinds import kinds_of
from gs_dist.checkpoint.sources.catalogue import Catalogue, take_catalogue
from gs_dist.checkpoint.sources.directory import SourceDirectory
from gs_dist.conversion.assignment import Assignment, assign
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.parts import Part, cut, working_bytes
from gs_dist.conversion.schemes import FLOAT, find_scheme
from gs_dist.errors import PlanError, UserError
from gs_dist.model.kept_in_float import kept_reason
from gs_dist.planning.surroundings import Surroundings
from gs_dist.recipe.sizes import format_bytes
from gs_dist.wording import counted

__all__ = ["ConversionPlan", "plan_conversion"]

# Interpreter, NumPy and what the plan itself takes in a worker, measured at 60 MiB and told generously.
PROCESS_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """All that is decided before a weight is read.

    Attributes:
        config: what was asked for.
        source: the opened checkpoint.
        catalogue: what it holds.
        assignment: which linear gets which scheme.
        parts: the files of the result, and what goes into each.
        num_workers: processes that share the parts.
        memory_per_worker: bytes that a worker stays within.
        largest: full name of the weight that decides that.
        companions: files that go along with the weights.
        notes: for people.
    """

    config: ConversionConfig
    source: SourceDirectory
    catalogue: Catalogue
    assignment: Assignment
    parts: tuple[Part, ...]
    num_workers: int
    memory_per_worker: int
    largest: str
    companions: Companions
    notes: tuple[str, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes of the source."""
        return sum(part.nbytes for part in self.parts)

    def written_bytes(self, dialect: str) -> int:
        """Bytes of the result in a format."""
        dtype = self.catalogue.dtype
        return sum(stored.nbytes for part in self.parts for stored in part.tensors(dialect, dtype).values())

    @property
    def counts(self) -> Counter[str]:
        """Scheme to how many linears have it."""
        return Counter(scheme.name if scheme is not None else FLOAT for scheme in self.assignment.schemes.values())


def plan_conversion(config: ConversionConfig) -> ConversionPlan:
    """Opens the checkpoint by its headers, decides what becomes of every tensor, and bounds the memory.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        UserError: the schemes do not fit it.
        PlanError: a weight needs more memory than `memory_per_worker`.
    """
    source = SourceDirectory(Path(config.model))
    catalogue = take_catalogue(source)
    scheme = find_scheme(config.scheme, config.group_size, "scheme", config.ranges)
    assignment = assign(
        catalogue,
        scheme,
        config.layer_policies,
        group_size=config.group_size,
        formats=config.format,
        ranges=config.ranges,
    )
    if config.engine is not None:
        _refuse_unloadable(config.engine, config.format, catalogue, assignment)
    parts = cut(catalogue, assignment, config.format)
    pieces = [piece for part in parts for piece in part.pieces]
    largest = max(pieces, key=lambda piece: working_bytes(piece, config.format))
    needed = PROCESS_BYTES + working_bytes(largest, config.format)
    name = largest.source[0].name
    companions = source.companions()
    if config.memory_per_worker != "auto" and needed > config.memory_per_worker:
        raise PlanError(
            f"{name}: a worker needs {format_bytes(needed)} for it, and memory_per_worker is "
            f"{format_bytes(config.memory_per_worker)}: set memory_per_worker to {format_bytes(needed)} or more"
        )
    return ConversionPlan(
        config=config,
        source=source,
        catalogue=catalogue,
        assignment=assignment,
        parts=parts,
        num_workers=_workers(config, len(parts)),
        memory_per_worker=needed,
        largest=name,
        companions=companions,
        notes=(*_notes(catalogue), *source.notes, *companions.notes),
    )


def _refuse_unloadable(engine: str, formats: Sequence[str], catalogue: Catalogue, assignment: Assignment) -> None:
    """Refuses schemes that an engine has dropped, or does not have yet, before any work."""
    kinds = kinds_of(engine)
    if kinds is None:
        require_known(engine)
    if kinds is None or "ascend" not in formats:
        return
    found: dict[str, list[str]] = {}
    for name, expert in catalogue.expert_index().items():
        scheme = assignment.schemes[name]
        refusal = None if scheme is None else kinds.refusal(scheme.name, expert=expert)
        if refusal is not None:
            found.setdefault(refusal, []).append(name)
    if found:
        lines = [f"{names[0]} and {len(names) - 1} more: {refusal}" for refusal, names in found.items()]
        raise UserError("the result would not be loaded: " + "; ".join(lines))


def _workers(config: ConversionConfig, num_parts: int) -> int:
    asked = Surroundings.of_this_process().num_cpus if config.workers == "auto" else config.workers
    return max(1, min(asked, num_parts))


def _notes(catalogue: Catalogue) -> list[str]:
    notes = []
    if not catalogue.family.known:
        notes.append(
            f"model type {catalogue.model_type} is not known: linears of the usual names are quantised, all others "
            "stay in floats; name more of them in layer_policies"
        )
    if catalogue.encoding and not catalogue.encoded:
        notes.append(
            f"config.json: quantization_config speaks of weights in {catalogue.encoding}, and every tensor is in "
            "float, as where they were decoded before: they are taken as they are"
        )
    odd = [
        carried.info
        for carried in catalogue.carried
        if len(carried.info.shape) > 2
        and carried.expert is None
        and kept_reason(carried.name.removesuffix(".weight"), catalogue.family) is None
    ]
    if odd:
        notes.append(
            f"no experts by name, and carried over as they are: {counted(len(odd), 'tensor')} of more than two "
            f"dimensions, such as {odd[0].name} {odd[0].shape}; to have linears quantised, publish them one by one"
        )
    return notes
