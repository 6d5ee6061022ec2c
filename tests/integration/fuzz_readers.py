"""Coverage-guided fuzzing of what reads a user's files: recipes, safetensors headers, JSON beside them.

Not part of the suite: it runs until it is stopped, or for as long as it is told.

    pip install atheris==3.0.0
    python tests/integration/fuzz_readers.py recipe -max_total_time=300 -rss_limit_mb=1024
    python tests/integration/fuzz_readers.py header -max_total_time=300 -rss_limit_mb=1024
    python tests/integration/fuzz_readers.py manifest -max_total_time=300 -rss_limit_mb=1024

A reader gives a result or one of this project's errors; anything else, and any input that takes over 5 seconds or
more than the memory allowed, stops the run and is written to a file.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gs_dist", "yaml"]):
    from gs_dist.checkpoint.header import read_header
    from gs_dist.checkpoint.manifest import read_manifest
    from gs_dist.checkpoint.provenance import read_hashes
    from gs_dist.errors import UserError
    from gs_dist.recipe.config import load_recipe

DIRECTORY = Path(tempfile.mkdtemp(prefix="gs-dist-fuzz-"))
RECIPE = """\
model: /models/tiny
output: /out
calibration: {data: [a.parquet], num_samples: 8, sequence_length: 32}
ptq: {weight_quant_dtype: qint4x2, weight_quant_granularity: per_group, group_size: 64, outliers_suppression: awq}
layer_policies: {'.*mlp.*': {precision_recovery: gptq, algo_args: {desc_act: true}}, '.*o_proj': null}
parallel: {pipeline_parallel_size: 2, memory_per_worker: 60GiB}
"""
HEADER = {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
MANIFEST = {"version": 1, "layer": 0, "fingerprints": {"recipe": "r", "source": "s", "data": "d"}, "shards": {}}


def recipe(data: bytes) -> None:
    """A recipe of these bytes."""
    path = DIRECTORY / "recipe.yaml"
    path.write_bytes(data)
    load_recipe(path)


def header(data: bytes) -> None:
    """A safetensors file of these bytes; every other one with a header length that is right."""
    path = DIRECTORY / "model.safetensors"
    whole = data[:1] < b"\x80"
    path.write_bytes(data[1:] if whole else struct.pack("<Q", len(data) - 1) + data[1:] + bytes(8))
    read_header(path, path.name)


def manifest(data: bytes) -> None:
    """The manifest of a layer, and a model's provenance, of these bytes."""
    (DIRECTORY / "manifests").mkdir(exist_ok=True)
    (DIRECTORY / "manifests" / "layer-00000.json").write_bytes(data)
    (DIRECTORY / "provenance.json").write_bytes(data)
    try:
        read_manifest(DIRECTORY, 0)
    finally:
        read_hashes(DIRECTORY)


TARGETS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "recipe": (recipe, RECIPE.encode()),
    "header": (header, b"\xff" + json.dumps(HEADER).encode()),
    "manifest": (manifest, json.dumps(MANIFEST).encode()),
}


def main() -> None:
    """Fuzzes the reader that the first argument names; the others are libFuzzer's."""
    target, seed = TARGETS[sys.argv.pop(1)]
    corpus = DIRECTORY / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)

    def read(data: bytes) -> None:
        said = "read"
        try:
            target(data)
        except UserError as error:
            said = str(error)
        assert 0 < len(said) < 20_000

    atheris.Setup([*sys.argv, str(corpus), "-timeout=5"], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
