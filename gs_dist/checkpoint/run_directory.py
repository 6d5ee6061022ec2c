"""The output directory of a job: who may write to it, what is finished in it, and when it is done.

A dead job leaves finished layers and no lock; `done` is written last, when everything else was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.finished_model import UNJUDGED, move, take_entrance, unjudged
from gs_dist.checkpoint.job_end import forget_refusal, note_refusal
from gs_dist.checkpoint.kept_statistics import (
    STATISTICS,
)
from gs_dist.checkpoint.layer_costs import SENSITIVITY
from gs_dist.checkpoint.lineage import EMBEDDING, checksums
from gs_dist.checkpoint.manifest import (
    MANIFESTS,
    Fingerprints,
    LayerManifest,
    MadeWith,
    part_stem,
    publish_outer,
    read_manifest,
    shard_faults,
)
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.output_lock import DONE, refuse_foreign
from gs_dist.checkpoint.provenance import HASHING_THREADS, write_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_record import (
    RunRecord,
    read_record,
    recipe_differences,
    version_differences,
    write_record,
)
from gs_dist.checkpoint.sealed_json import write_sealed_json
from gs_dist.checkpoint.solved_layer import SOLVED, remove_solved, solved_is_whole
from gs_dist.checkpoint.writer import make_directory, remove_leftovers
from gs_dist.errors import DamagedError, OutputError
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["RunDirectory"]


class RunDirectory:
    """The output of one job.

    Args:
        path: the directory; made where it does not exist.
        dialects: the dialects the job writes.
        fingerprints: what the job works on; layers finished from something else are refused.
        recipe: what of the recipe decides the bytes; None where it is not known.
        made_with: the software of the job, whose layers are not mixed with another's; None where it is not known.
    """

    def __init__(
        self,
        path: Path,
        *,
        dialects: tuple[str, ...],
        fingerprints: Fingerprints,
        recipe: Mapping[str, Any] | None = None,
        made_with: MadeWith | None = None,
    ) -> None:
        self.path = path
        self._dialects = dialects
        self._fingerprints = fingerprints
        self._recipe = recipe
        self._made_with = made_with

    def refuse_other_run(self) -> None:
        """Refuses at once what `prepare` would refuse later; reads manifests and no shard.

        Raises:
            OutputError: the directory holds another run, one of other software, or something else.
        """
        if not self.path.is_dir():
            return
        refuse_foreign(self.path)
        for path in sorted((self.path / MANIFESTS).glob("layer-*.json")):
            number = path.stem.removeprefix("layer-")
            with suppress(DamagedError):  # `prepare` tells of it
                manifest = read_manifest(self.path, int(number)) if number.isdecimal() else None
                if manifest is not None:
                    self._refuse_other(manifest)
        self._refuse_other_statistics()

    def prepare(
        self,
        num_layers: int,
        tell: Callable[[str], None] = lambda text: None,
        reader: CheckpointReader | None = None,
    ) -> dict[int, LayerManifest]:
        """Clears what dead writers left, and returns the finished layers, their shards verified by hash.

        A layer whose shard is missing or changed counts as unfinished and is done again; so does one whose quantised
        form a later layer has yet to see, where that form is missing or changed.

        Args:
            num_layers: of the model.
            tell: told of what is done again, and why.
            reader: of the source checkpoint; if given, the tensors that finished parts were made from are read and
                compared.

        Raises:
            OutputError: the directory holds a run of another recipe, model, data or software, or something else.
        """
        self.refuse_other_run()
        self.withdraw()
        finished = {}
        for layer in range(num_layers):
            manifest = self._whole_part(layer, tell)
            if manifest is not None:
                finished[layer] = manifest
        if self._recipe is not None and self._recipe.get("propagation") == "quantized":
            self._forget_unsolved(finished, num_layers, tell)
        if reader is not None:
            self._refuse_changed_source(reader, finished)
        self._begin(num_layers)
        return finished

    def _begin(self, num_layers: int) -> None:
        """Nothing here looks finished any more: `done`, configs and indices go, and what dead writers left."""
        (self.path / DONE).unlink(missing_ok=True)
        forget_refusal(self.path, self._dialects)
        for name in self._dialects:
            take_entrance(self.path / name)
        for directory in (
            self.path,
            *(self.path / name for name in (*self._dialects, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED)),
        ):
            if directory.is_dir():
                remove_leftovers(directory)
        if self._recipe is not None:
            record = RunRecord(
                num_layers=num_layers,
                dialects=self._dialects,
                recipe=self._recipe,
                fingerprints=self._fingerprints,
                made_with=self._made_with,
            )
            write_record(self.path, record)

    def _whole_part(self, layer: int | None, tell: Callable[[str], None]) -> LayerManifest | None:
        """The manifest of a layer (None: of the outer part), if its shards are there and as they were written."""
        again = f"{'the outer tensors are' if layer is None else f'layer {layer} is'} done again"
        try:
            manifest = read_manifest(self.path, layer)
        except DamagedError as error:
            tell(f"{error}: {again}")
            return None
        if manifest is None:
            return None
        self._refuse_other(manifest)
        if not set(manifest.shards) >= set(self._dialects):
            return None
        faults = shard_faults(self.path, manifest)
        if not faults and manifest.lineage is None:
            faults = [f"{MANIFESTS}/{manifest.stem}.json does not tell which source tensors the layer was made from"]
        if faults:
            tell(f"{faults[0]}: {again}")
            return None
        return manifest

    def _forget_unsolved(
        self, finished: dict[int, LayerManifest], num_layers: int, tell: Callable[[str], None]
    ) -> None:
        """Takes layers out whose quantised form an unfinished layer has to see and cannot.

        A finished job has none of these forms any more. They are made again from the samples, to the same bytes.
        """
        last = max((layer for layer in range(num_layers) if layer not in finished), default=-1)
        lost = [layer for layer in finished if layer < last and not solved_is_whole(self.path, layer)]
        for layer in lost:
            del finished[layer]
        if lost:
            layers = f"layer {lost[0]} is" if len(lost) == 1 else f"layers {', '.join(map(str, lost))} are"
            tell(
                f"{layers} done again: layer {last} is to see what quantised layers give, and "
                f"{SOLVED}/{part_stem(lost[0])}.safetensors is gone or was changed"
            )

    def _refuse_changed_source(self, reader: CheckpointReader, finished: Mapping[int, LayerManifest]) -> None:
        """Reads the source tensors that finished parts were made from, and compares their checksums.

        Raises:
            OutputError: the model is not what it was.
        """
        parts = [*finished.values()]
        with suppress(DamagedError):
            outer = read_manifest(self.path, None)
            parts += [] if outer is None or not finished else [outer]

        def changed(part: LayerManifest) -> list[str]:
            tensors = reader.read(reader.outer_part) if part.layer is None else reader.read_layer(part.layer)
            return [] if part.lineage is None else part.lineage.changed(checksums(tensors))

        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            for part, names in zip(parts, pool.map(changed, parts), strict=True):
                if names:
                    prefix = "" if part.layer is None else reader.architecture.layer_prefix(part.layer)
                    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    raise OutputError(
                        f"output {str(self.path)!r} holds a run in which the model differed: {prefix}{names[0]}{more} "
                        f"is not what {part.stem} was made from. Restore what it was, or set output to another "
                        "directory"
                    )

    def _refuse_other(self, manifest: LayerManifest) -> None:
        """Refuses to add to a layer that was made from something else, or with other versions."""
        names = {"recipe": "the recipe", "source": "the model", "data": "the calibration data"}
        theirs, ours = manifest.fingerprints, self._fingerprints
        different = [label for key, label in names.items() if getattr(theirs, key) != getattr(ours, key)]
        if different:
            record, told = read_record(self.path), ""
            if self._recipe is not None and record is not None and record.fingerprints.recipe == theirs.recipe:
                told = "; ".join(recipe_differences(record.recipe, self._recipe))
            raise OutputError(
                f"output {str(self.path)!r} holds a run in which {' and '.join(different)} differed"
                f"{f' ({told})' if told else ''}: restore what it was, or set output to another directory"
            )
        if self._made_with is not None:
            self._refuse_versions(manifest.made_with, f"layer {manifest.layer}")

    def _refuse_other_statistics(self) -> None:
        """What was judged before any layer was published is of the software of the run's start."""
        record = read_record(self.path)
        if self._made_with is None or record is None or record.made_with is None:
            return
        if record.fingerprints == self._fingerprints and any((self.path / SENSITIVITY).glob("layer-*.json")):
            self._refuse_versions(record.made_with, "what layers were judged on")

    def _refuse_versions(self, theirs: MadeWith, what: str) -> None:
        assert self._made_with is not None
        differing = version_differences(theirs, self._made_with)
        if differing:
            raise OutputError(
                f"output {str(self.path)!r} holds {what} made with other software ({'; '.join(differing)}), and one "
                "model of two versions would be of neither: install what it was made with to go on, or set output to "
                "another directory"
            )

    def merge(
        self,
        reader: CheckpointReader,
        finished: Mapping[int, LayerManifest],
        outer: LayerManifest,
        policies: Mapping[str, QuantPolicy | None],
        *,
        recipe: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        """Makes each dialect's directory a model: carries the outer tensors over, writes config, index and provenance.

        It lies apart, at `unjudged`, until `finish`: nothing that loads models finds one that may yet be refused.

        Args:
            reader: the source checkpoint.
            finished: manifests of all layers.
            outer: of the outer part, as `outer` gives it.
            policies: what the recipe asked for, by full name of linear.
            recipe: what of it decides the bytes, for `provenance.json`.
            versions: package to version, for the same.

        Raises:
            JobFailure: a tensor of the source is unaccounted for.
            OutputError: the parts were made from different models.
        """
        _refuse_mixture(self.path, finished, outer)
        make_directory(self.path / UNJUDGED)
        for name in self._dialects:
            move(self.path / name, unjudged(self.path, name))
            merged = merge_checkpoint(self.path / UNJUDGED, name, reader, finished.values(), outer, policies)
            parts = (*finished.values(), outer)
            write_provenance(unjudged(self.path, name), parts, recipe=recipe, versions=versions, files=merged.files)

    def outer(self, reader: CheckpointReader) -> LayerManifest:
        """The manifest of the outer part, which is published anew unless it is whole and of this job.

        Raises:
            OutputError: it cannot be written.
        """
        with suppress(DamagedError):
            outer = read_manifest(self.path, None)
            if (
                outer is not None
                and outer.fingerprints == self._fingerprints
                and not shard_faults(self.path, outer)
                and outer.lineage is not None
                and not outer.lineage.changed(checksums(reader.read(reader.outer_part)))
            ):
                return outer
        return publish_outer(self.path, reader, self._dialects, self._fingerprints, self._made_with or MadeWith())

    def withdraw_outer(self) -> None:
        """Takes the outer part back: of a job that came to nothing, nothing is left."""
        stem = part_stem(None)
        (self.path / MANIFESTS / f"{stem}.json").unlink(missing_ok=True)
        for name in self._dialects:
            (self.path / name / f"{stem}.safetensors").unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there, or it was never made
                (self.path / name).rmdir()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Puts the models into their places and writes `done`: what the job published was checked."""
        for name in self._dialects:
            move(unjudged(self.path, name), self.path / name)
        (self.path / UNJUDGED).rmdir()
        remove_solved(self.path)
        write_sealed_json(self.path / DONE, facts)

    def refuse(self, reason: str) -> None:
        """Writes down why there is no model."""
        note_refusal(self.path, self._dialects, reason)

    def withdraw(self) -> None:
        """Takes back what `merge` made, as far as it is there: shards stay, and there is no model any more."""
        for name in DIALECTS:
            directory = unjudged(self.path, name)
            if directory.is_dir():
                take_entrance(directory)
                move(directory, self.path / name)
        with suppress(FileNotFoundError):
            (self.path / UNJUDGED).rmdir()


def _refuse_mixture(output: Path, finished: Mapping[int, LayerManifest], outer: LayerManifest) -> None:
    """Refuses layers of which one was observed behind other weights than the others were made from."""
    assert outer.lineage is not None
    behind = outer.lineage.tensors[EMBEDDING]
    for layer in sorted(finished):
        lineage = finished[layer].lineage
        if lineage is None:
            return
        if lineage.behind != behind:
            before = "the embedding" if layer == 0 else f"the embedding and layers 0 to {layer - 1}"
            raise OutputError(
                f"output {str(output)!r} holds layers of two models: layer {layer} was observed behind other weights "
                f"than {before} have. The model changed during the run: leave it alone, and set output to another "
                "directory"
            )
        behind = lineage.after
