"""Says what a quantised model directory is, and which rule of its format or of an engine's loader it breaks.

Nothing is trusted, nothing executed or unpickled; memory is bounded by one tensor.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from gs_dist.architecture import DecoderArchitecture
from gs_dist.checkpoint.engines import ENGINES
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory, take_inventory
from gs_dist.checkpoint.layouts import Layout, build_layout, detect_format
from gs_dist.checkpoint.manifest import MANIFESTS, LayerManifest, read_manifest
from gs_dist.checkpoint.problems import CheckReport, Problem
from gs_dist.checkpoint.values import check_static_linears, check_tensors
from gs_dist.errors import OutputError, UserError

__all__ = ["CheckReport", "Problem", "check"]

_CHUNK = 16 << 20  # bytes hashed at a time


def check(directory: Path | str, engine: str | None = None) -> CheckReport:
    """Checks a model directory against its own format, and against an engine's loader if one is named.

    Where the directory lies in a job's output, its files are compared with the manifests' hashes as well.

    Args:
        directory: holds config.json and the weights; or a job's output with one format in it.
        engine: "vllm-ascend", "vllm-mindspore", "vllm" or "transformers"; None for the format's rules alone.

    Raises:
        UserError: no such directory, several formats in it, or an unknown engine. Everything else that is
            wrong comes back as a problem.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--for {engine}: known engines are {', '.join(sorted(ENGINES))}")
    inventory = take_inventory(_model_directory(Path(directory)))
    dialect = detect_format(inventory)
    architecture = inventory.architecture
    layout = Layout(format=dialect)
    if dialect and architecture is not None:
        layout = build_layout(inventory, dialect, architecture)
        sound = check_tensors(inventory, layout)
        check_static_linears(inventory, layout, sound)
        if engine is not None:
            ENGINES[engine](inventory, layout)
        _check_manifests(inventory, architecture)
    problems = sorted(set(inventory.problems), key=lambda p: (p.file, p.tensor, p.rule))
    return CheckReport(
        format=dialect, engine=engine, problems=tuple(problems), facts=_facts(inventory, layout, architecture)
    )


def _model_directory(directory: Path) -> Path:
    """`directory`, or the one model directory within a job's output."""
    if (directory / CONFIG_FILE).is_file() or not (directory / MANIFESTS).is_dir():
        return directory
    inner = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if len(inner) > 1:
        names = ", ".join(path.name for path in inner)
        raise UserError(f"{str(directory)!r} holds several formats ({names}): name one of these directories")
    return inner[0] if inner else directory


def _check_manifests(inventory: Inventory, architecture: DecoderArchitecture) -> None:
    """Sizes and hashes of the shards against what was noted when they were written."""
    run = inventory.directory.resolve().parent
    if not (run / MANIFESTS).is_dir():
        return
    for layer in (None, *range(architecture.num_layers)):
        label = f"{MANIFESTS}/{'outer' if layer is None else f'layer-{layer:05d}'}.json"
        try:
            manifest = read_manifest(run, layer)
        except OutputError as error:
            inventory.report(label, "manifest-valid", error, "a manifest")
            continue
        if manifest is None:
            inventory.report(label, "manifest-present", "no such file", "a manifest for every shard")
            continue
        _compare_shard(inventory, manifest)


def _compare_shard(inventory: Inventory, manifest: LayerManifest) -> None:
    record = manifest.shards.get(inventory.directory.resolve().name)
    path = inventory.files.get(record.file) if record is not None else None
    if record is None or path is None:
        return  # another format's directory, or a file that was reported already
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != record.sha256:
        expected = f"{record.sha256[:12]}... of manifests/{manifest.stem}.json"
        inventory.report(record.file, "shard-hash", f"sha256 {digest.hexdigest()[:12]}...", expected)


def _facts(inventory: Inventory, layout: Layout, architecture: DecoderArchitecture | None) -> dict[str, str]:
    """What the directory is, for a reader."""
    facts = {"format": layout.format or "unknown"}
    if architecture is not None:
        facts["model"] = f"{architecture.model_type}, {architecture.num_layers} layers, {architecture.dtype}"
        facts["head"] = "tied to the embedding" if architecture.tie_word_embeddings else "of its own"
    counts = Counter(layout.kinds.values())
    facts["linears"] = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    if layout.kv_layers:
        facts["kv cache"] = f"int8 in {len(layout.kv_layers)} layers"
    nbytes = sum(info.nbytes for info in inventory.tensors.values())
    facts["tensors"] = f"{len(inventory.tensors)} in {len(inventory.files)} files, {nbytes / 1e9:.3f} GB"
    return facts
