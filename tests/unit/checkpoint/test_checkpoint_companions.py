"""Everything that is not weights goes along, and what does not is told with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint

from gs_dist.checkpoint.companions import copy_companions, find_companions
from gs_dist.errors import CheckpointError

CARRIED = [
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "README_zh.md",
    "a.txt",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
    "configuration.json",
    "figures/benchmark.png",
    "generation_config.json",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = {
    "README.md": "this model gets a card of its own",
    "consolidated.safetensors": "weights that no loader reads",
    "hf_quant_config.json": "would tell loaders of another quantisation",
    "modeling_x.py": "code",
    "nested/pytorch_model.bin": "pickled",
    "onnx/": "weights in another form",
    "original/": "the model under Meta's own names",
    "params.json": "describes the weights under Mistral's or Meta's own names",
    "pytorch_model.bin.index.json": "an index of pickled weights",
    "tf_model.h5": "weights in another form",
    "training_args.bin": "pickled",
}
UNTOLD = ["config.json", ".gitattributes", ".cache/huggingface/x", "model-00001-of-00002.safetensors"]


def lay_out(directory: Path, names: list[str]) -> Path:
    for name in names:
        path = directory / (f"{name}consolidated.00.pth" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return directory


def test_all_is_carried_that_no_reason_keeps_back(tmp_path: Path) -> None:
    """Names nobody thought of go along; weights, code and what would mislead loaders do not, and are told."""
    found = find_companions(lay_out(tmp_path / "m", [*CARRIED, *LEFT, *UNTOLD]))
    assert list(found.carried) == sorted(CARRIED)
    assert found.left == LEFT
    said = "\n".join(found.notes)
    assert "'pytorch_model.bin.index.json' (an index of pickled weights)" in said
    for name in LEFT:
        assert name in said


def test_copies_have_the_bytes_and_the_folders(tmp_path: Path) -> None:
    """A template in a folder of its own arrives in that folder."""
    found = find_companions(lay_out(tmp_path / "m", CARRIED))
    (tmp_path / "out").mkdir()
    assert copy_companions(found, tmp_path / "out") == sorted(CARRIED)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == CARRIED[5]
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(
        CARRIED
    )


def test_a_tokenizer_file_that_cannot_go_along_is_refused(tmp_path: Path) -> None:
    """A model without it would not be the same: too large, a link to elsewhere or a link to nothing."""
    directory = tiny_checkpoint(tmp_path / "m")
    with (directory / "spiece.model").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(
        CheckpointError, match=r"^'spiece\.model': of 300\.0 MiB, more than the 256\.0 MiB of any token"
    ):
        find_companions(directory)
    (directory / "spiece.model").unlink()
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", tmp_path / "nothing"):
        (directory / "tokenizer.model").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"^'tokenizer\.model': points outside of the directory, or nowhere"):
            find_companions(directory)
        (directory / "tokenizer.model").unlink()


def test_other_files_that_cannot_go_along_stay_behind_and_are_told(tmp_path: Path) -> None:
    """A link to elsewhere is never followed, whatever it is called."""
    directory = tiny_checkpoint(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (directory / "NOTES").symlink_to(tmp_path / "secret")
    (directory / "folder").symlink_to(tmp_path)
    os.mkfifo(directory / "pipe")
    with (directory / "data.parquet").open("wb") as file:
        file.truncate(257 << 20)
    (directory / "a\x1b[31m").write_text("red")
    found = find_companions(directory)
    assert list(found.carried) == ["generation_config.json"]
    assert found.left == {
        "NOTES": "points outside of the directory, or nowhere",
        "a\x1b[31m": "a name that no terminal shows",
        "data.parquet": "of 257.0 MiB, more than the 256.0 MiB of any tokenizer",
        "folder": "points outside of the directory, or nowhere",
        "pipe": "no regular file",
    }
    assert not any("\x1b" in note for note in found.notes)


def test_links_within_the_directory_and_the_cache_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache holds nothing but links to blobs."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("template")
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/1")
    (snapshot / "LICENSE").symlink_to("additional_chat_templates/rag.jinja")
    found = find_companions(snapshot)
    assert list(found.carried) == ["LICENSE", "additional_chat_templates/rag.jinja"]
    (tmp_path / "out").mkdir()
    copy_companions(found, tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "template"


def test_a_directory_of_very_many_files_is_no_model(tmp_path: Path) -> None:
    """Somebody's home directory is not copied into a model."""
    lay_out(tmp_path / "m", [f"{number}.txt" for number in range(1001)])
    with pytest.raises(CheckpointError, match="holds more than 1000 files beside the weights"):
        find_companions(tmp_path / "m")
