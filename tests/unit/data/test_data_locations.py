from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gs_dist.data.files import open_file
from gs_dist.data.locations import Found, find_files
from gs_dist.errors import DatasetError


def parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"input_ids": [[1, 2, 3]] * 8}), path)
    return path


def found(*entries: object) -> Found:
    return find_files([str(entry) for entry in entries])


def names(result: Found, base: Path) -> list[str]:
    return [str(Path(str(location)).relative_to(base)) for location in result.locations]


def refusal(*entries: object) -> str:
    with pytest.raises(DatasetError) as caught:
        found(*entries)
    return str(caught.value)


def test_patterns_leave_out_what_engines_and_storage_hide(tmp_path: Path) -> None:
    """`dir/*` over what Spark wrote gives what the directory gives; a pattern that names hidden files gives those."""
    parquet(tmp_path / "part-0.snappy.parquet")
    parquet(tmp_path / "_temporary" / "part-1.parquet")
    for marker in ("_SUCCESS", ".part-0.snappy.parquet.crc", "._part-0", "README.md"):
        (tmp_path / marker).write_text("no data")
    for entry in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**"):
        assert names(found(entry), tmp_path) == ["part-0.snappy.parquet"], entry
    assert names(found(f"{tmp_path}/_temp*/*"), tmp_path) == ["_temporary/part-1.parquet"]
    assert names(found(f"{tmp_path}/README.*"), tmp_path) == ["README.md"]


def test_a_directory_is_read_in_one_format(tmp_path: Path) -> None:
    """Parquet counts before JSON lines, and so on; what is left out is told."""
    parquet(tmp_path / "a.parquet")
    for name in ("b.jsonl", "c.jsonl.gz", "d.csv", "e.txt", "dataset_info.json", "README.md", "LICENSE"):
        (tmp_path / name).write_text("{}")
    result = found(tmp_path)
    assert names(result, tmp_path) == ["a.parquet"]
    assert len(result.notes) == 1
    assert "1 file such as a.parquet" in result.notes[0]
    assert "4 files such as b.jsonl are left out" in result.notes[0]
    (tmp_path / "a.parquet").unlink()
    assert names(found(tmp_path), tmp_path) == ["b.jsonl", "c.jsonl.gz"]
    assert names(found(f"{tmp_path}/*"), tmp_path) == ["b.jsonl", "c.jsonl.gz"]


@pytest.mark.parametrize(
    ("files", "splits", "write"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            "test, train",
            "data/train-*.parquet",
        ),
        (["train.parquet", "validation.parquet"], "train, validation", "train.parquet"),
        (["train/0.parquet", "dev/0.parquet"], "validation, train", "dev/*"),
        (["test.jsonl", "eval_2.jsonl", "val.jsonl"], "test, validation", "val.jsonl"),
        (
            ["data/train_sft-00000-of-00003.parquet", "data/test_sft-00000-of-00001.parquet"],
            "test, train",
            "data/train_sft-*",
        ),
    ],
)
def test_several_splits_are_not_mixed(tmp_path: Path, files: list[str], splits: str, write: str) -> None:
    """A directory, and a pattern, that hold several splits by their names are refused, with what to write instead."""
    for file in files:
        parquet(tmp_path / file)
    for entry in (tmp_path, f"{tmp_path}/**"):
        text = refusal(entry)
        assert f"holds several splits ({splits})" in text
        assert f"{tmp_path}/{write}" in text
    written = refusal(tmp_path).partition("in calibration.data: ")[2].split(", ")
    assert sum(len(found(entry).locations) for entry in written) >= len(set(splits.split(", ")))


def test_names_that_only_look_like_splits_are_files(tmp_path: Path) -> None:
    """One split, and words that merely contain its name, are no reason to refuse."""
    for name in (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "latest.parquet",
        "constraint.parquet",
    ):
        parquet(tmp_path / name)
    assert len(found(tmp_path).locations) == 4
    base = tmp_path / "test" / "runs"  # of the place, not of the data
    parquet(base / "train.parquet")
    assert names(found(base), base) == ["train.parquet"]


@pytest.mark.parametrize(
    ("marker", "what"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
        ("_versions/1.manifest", "a Lance dataset"),
        ("metadata/v1.metadata.json", "an Iceberg table"),
    ],
)
def test_a_table_with_removed_rows_is_refused(tmp_path: Path, marker: str, what: str) -> None:
    """Files of a table still hold rows that were removed from it: it is to be exported, wherever it lies."""
    table = tmp_path / "lake" / "table"
    parquet(table / "part-0.parquet")
    (table / marker).parent.mkdir(parents=True)
    (table / marker).write_text("{}")
    for entry in (table, tmp_path, f"{tmp_path}/lake/*"):
        text = refusal(entry)
        assert f"is {what}, whose files also hold rows that were removed: export what it holds now" in text
    if what != "an Iceberg table":
        assert what in refusal(f"{table}/*.parquet")
    assert len(found(table / "part-0.parquet").locations) == 1  # who names a file means it


def test_a_lfs_pointer_is_not_the_data(tmp_path: Path) -> None:
    """What Git leaves in place of a large file says so, and how to get it, whatever the file is called."""
    for name in ("a.parquet", "a.jsonl", "a.txt", "a.csv", "a"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
        with pytest.raises(DatasetError, match="is a Git LFS pointer and not the data: run `git lfs pull`"):
            open_file(found(tmp_path / name).locations[0], sample_by="line")


def test_formats_are_told_by_content_then_by_name(tmp_path: Path) -> None:
    """JSON lines, JSON, CSV and text each come as what they are, compressed or not."""
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    whole = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
    for name, data, kind in (
        ("a.jsonl", lines, "JsonLinesFile"),
        ("a.json", lines, "JsonLinesFile"),
        ("a.data", lines, "JsonLinesFile"),
        ("a.json", whole, "JsonFile"),
        ("a.json", b'{\n "text": "a"\n}\n', "JsonFile"),
        ("a.csv", b"text\na\n", "CsvFile"),
        ("a.tsv", b"text\tn\na\t1\n", "CsvFile"),
        ("a.txt", b"[not JSON]", "TextFile"),
        ("a.md", b"# title", "TextFile"),
    ):
        for suffix, pack in (("", bytes), (".gz", gzip.compress)):
            (tmp_path / f"{name}{suffix}").write_bytes(pack(data))
            file = open_file(found(tmp_path / f"{name}{suffix}").locations[0], sample_by="line")
            assert type(file).__name__ == kind, name
            assert "text" in file.schema.names
    (tmp_path / "odd").write_bytes(b"\x00\x01nothing known")
    with pytest.raises(
        DatasetError, match=r"neither Parquet nor .* it begins with b'\\x00\\x01no.*known by their suffix"
    ):
        open_file(found(tmp_path / "odd").locations[0], sample_by="line")
    parquet(tmp_path / "p.parquet")
    (tmp_path / "p.parquet.gz").write_bytes(gzip.compress((tmp_path / "p.parquet").read_bytes()))
    with pytest.raises(DatasetError, match=r"gzip around an Arrow or Parquet file: unpack it"):
        open_file(found(tmp_path / "p.parquet.gz").locations[0], sample_by="line")


def test_a_hub_without_network_is_the_users_to_mend(tmp_path: Path) -> None:
    """hf:// where nothing answers is told like any place that cannot be reached, not as a fault of the program."""
    script = (
        "from gs_dist.data.locations import find_files\nfrom gs_dist.errors import DatasetError\n"
        "try: find_files(['hf://datasets/someone/something/data/train.parquet'])\n"
        "except DatasetError as error: print('refused:', error)\n"
    )
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "HOME": str(tmp_path),
    }
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout.startswith("refused: hf://datasets/someone/something/data/train.parquet cannot be read:"), ran
