"""Checkpoint directories: what is there is mapped, what is missing, extra or outside is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    DTYPES,
    header_only_checkpoint,
    random_tensors,
    save_checkpoint,
    save_safetensors,
    tensor_shapes,
    tiny_checkpoint,
    tiny_config,
)
from safetensors.numpy import load_file

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_bit_for_bit(model_type: str, dtype: str, shards: int, tmp_path: Path) -> None:
    """Single files and indexed shards of every float dtype give the arrays that were saved, read-only."""
    tiny_checkpoint(tmp_path / "m", model_type, dtype, shards)
    reader = CheckpointReader(tmp_path / "m")
    wanted = random_tensors(reader.config, dtype)
    found = reader.read(reader.tensors)
    assert set(found) == set(wanted)
    for name, array in found.items():
        assert array.dtype == DTYPES[dtype]
        assert array.tobytes() == wanted[name].tobytes()
        assert not array.flags.writeable
        assert array.flags.aligned
    assert len(reader.files) == shards


def test_layer_and_outer_parts(tmp_path: Path) -> None:
    """A layer is given by names within it; embedding, norm and head by full name."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", "qwen2", tie=True))
    assert set(reader.read_layer(1)) == set(reader.architecture.layer_tensors(1))
    assert set(reader.read_outer()) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert reader.layer_tensors(1)["mlp.up_proj.weight"].name == "model.layers.1.mlp.up_proj.weight"


def test_only_the_files_that_hold_the_names_are_opened(tmp_path: Path) -> None:
    """A worker's read succeeds although files of other layers have gone meanwhile."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", shards=4, num_layers=4))
    needed = {info.file for info in reader.layer_tensors(3).values()}
    for file in set(reader.files) - needed:
        (tmp_path / "m" / file).unlink()
    assert reader.read_layer(3)["mlp.down_proj.weight"].shape == (64, 128)
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        reader.read(["model.embed_tokens.weight"])


def test_views_outlive_the_reader_and_cost_no_copy(tmp_path: Path) -> None:
    """Arrays view the mapped file and keep it mapped by themselves."""
    directory = tiny_checkpoint(tmp_path / "m")
    array = CheckpointReader(directory).read_layer(0)["mlp.up_proj.weight"]
    assert not array.flags.owndata
    assert np.isfinite(array).all()


def test_unaligned_tensors_are_readable(tmp_path: Path) -> None:
    """A file whose data starts at an odd byte still gives aligned arrays with the right values."""
    directory = tiny_checkpoint(tmp_path / "m")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    reader = CheckpointReader(directory)
    wanted = random_tensors(reader.config)
    for name, array in reader.read(reader.tensors).items():
        assert array.flags.aligned
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, wanted[name])


@pytest.mark.parametrize(("name", "layers", "billions"), [("llama-3-70b", 80, 70.55), ("qwen3-32b", 64, 32.76)])
def test_a_huge_checkpoint_opens_by_its_headers(name: str, layers: int, billions: float, tmp_path: Path) -> None:
    """Headers alone tell all there is to plan with, from files of 140 GB that occupy nothing on disk."""
    reader = CheckpointReader(header_only_checkpoint(tmp_path / "m", name))
    size = sum(info.nbytes for info in reader.tensors.values())
    assert reader.architecture.num_layers == layers
    assert size / 2e9 == pytest.approx(billions, abs=0.01)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "m").iterdir()) < 4 << 20
    assert len(reader.fingerprint()) == 64
    assert reader.read_layer(layers - 1)["mlp.down_proj.weight"].dtype == DTYPES["bfloat16"]


def test_harmless_extras_are_ignored_and_named(tmp_path: Path) -> None:
    """Rotary buffers and the copy of a tied head are tolerated and listed."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert set(reader.ignored) == {"model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"}
    assert set(reader.tensors) == set(tensor_shapes(config))


def test_without_a_stated_dtype_the_embedding_decides(tmp_path: Path) -> None:
    """A config.json that states no dtype is completed from the tensors."""
    directory = tiny_checkpoint(tmp_path / "m", dtype="bfloat16")
    edit(directory / "config.json", lambda config: config.pop("torch_dtype"))
    assert CheckpointReader(directory).architecture.dtype == "bfloat16"


TENSOR_FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("missing", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks 'model.layers.1.mlp.up_proj.weight'"),
    ("head missing", lambda t: t.pop("lm_head.weight"), "tie_word_embeddings: true"),
    ("extra", lambda t: t.update(score=np.ones(3, np.float32)), "model.safetensors: holds 'score'"),
    (
        "a layer too many",
        lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(64, np.float32)}),
        "num_hidden_layers is 2",
    ),
    (
        "bias unasked for",
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.ones(128, np.float32)}),
        "holds 'model.layers.0.mlp.up_proj.bias'",
    ),
    (
        "shape",
        lambda t: t.update({"model.norm.weight": np.ones(65, np.float32)}),
        r"'model.norm.weight' has shape \(65,\)",
    ),
    (
        "transposed",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((64, 128), np.float32)}),
        r"has shape \(64, 128\), and config.json calls for \(128, 64\)",
    ),
    (
        "integers",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((128, 64), np.int8)}),
        r"'model.layers.0.mlp.up_proj.weight' \(int8\) is of quantised weights",
    ),
]


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in TENSOR_FAULTS], ids=[r[0] for r in TENSOR_FAULTS])
def test_tensors_must_be_those_of_the_architecture(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    """Missing, extra, misshapen and integer tensors are refused by name."""
    tensors = random_tensors(tiny_config())
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(save_checkpoint(tmp_path / "m", tiny_config(), tensors))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    """A long list is cut to three names and a count."""
    tensors = {n: a for n, a in random_tensors(tiny_config()).items() if "layers.1." not in n}
    with pytest.raises(CheckpointError, match="and 6 more"):
        CheckpointReader(save_checkpoint(tmp_path / "m", tiny_config(), tensors))


def test_a_base_model_is_told_from_a_language_model(tmp_path: Path) -> None:
    """Names without their `model.` prefix are recognised in the message."""
    tensors = {name.removeprefix("model."): array for name, array in random_tensors(tiny_config()).items()}
    with pytest.raises(CheckpointError, match="save the causal language model itself"):
        CheckpointReader(save_checkpoint(tmp_path / "m", tiny_config(), tensors))


INDEX_FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no weight_map", lambda i: i.pop("weight_map"), "weight_map must map"),
    ("weight_map a list", lambda i: i.update(weight_map=["a"]), "weight_map must map"),
    ("weight_map empty", lambda i: i.update(weight_map={}), "weight_map must map"),
    ("file a number", lambda i: i["weight_map"].update({"lm_head.weight": 3}), "'lm_head.weight' is mapped to 3"),
    ("a pickle", lambda i: i["weight_map"].update({"lm_head.weight": "x.bin"}), "mapped to 'x.bin'"),
    ("climbing", lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"}), "points outside"),
    ("climbing later", lambda i: i["weight_map"].update({"lm_head.weight": "a/../../x.safetensors"}), "points outside"),
    ("absolute", lambda i: i["weight_map"].update({"lm_head.weight": "/etc/x.safetensors"}), "points outside"),
    ("backslash", lambda i: i["weight_map"].update({"lm_head.weight": "..\\x.safetensors"}), "points outside"),
    ("NUL", lambda i: i["weight_map"].update({"lm_head.weight": "x\0.safetensors"}), "points outside"),
    ("file missing", lambda i: i["weight_map"].update({"lm_head.weight": "y.safetensors"}), "y.safetensors: is listed"),
    ("too long a name", lambda i: i["weight_map"].update({"lm_head.weight": "y" * 5000 + ".safetensors"}), "is listed"),
]


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in INDEX_FAULTS], ids=[r[0] for r in INDEX_FAULTS])
def test_an_index_must_fit_its_files(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    """An index that contradicts the files or leads out of the directory is refused."""
    directory = tiny_checkpoint(tmp_path / "m", shards=2)
    edit(directory / INDEX, change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(directory)


DISAGREEMENTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (
        "tensor unlisted",
        lambda i: i["weight_map"].pop("lm_head.weight"),
        "lacks 'lm_head.weight': read all the same, as loaders do",
    ),
    (
        "tensor listed and absent",
        lambda i: i["weight_map"].update({"ghost": i["weight_map"]["lm_head.weight"]}),
        "lists 'ghost', which no file holds",
    ),
    (
        "tensor in another file",
        lambda i: i["weight_map"].update({"lm_head.weight": i["weight_map"]["model.embed_tokens.weight"]}),
        "lists 'lm_head.weight' in another file than holds it: read where it is",
    ),
]


@pytest.mark.parametrize(("change", "note"), [r[1:] for r in DISAGREEMENTS], ids=[r[0] for r in DISAGREEMENTS])
def test_where_index_and_files_disagree_the_files_count(
    change: Callable[[dict[str, Any]], Any], note: str, tmp_path: Path
) -> None:
    """The index only says which files there are, as for transformers and vLLM; the disagreement is noted."""
    directory = tiny_checkpoint(tmp_path / "m", shards=2)
    edit(directory / INDEX, change)
    reader = CheckpointReader(directory)
    assert reader.notes == (f"model.safetensors.index.json {note}",)
    for name, wanted in random_tensors(reader.config).items():
        np.testing.assert_array_equal(reader.read([name])[name], wanted)


def test_a_tied_head_that_is_listed_and_absent_is_not_missed(tmp_path: Path) -> None:
    """Several tools list the head of a tied model in the index and do not store it."""
    directory = tiny_checkpoint(tmp_path / "m", "qwen2", tie=True, shards=2)
    edit(directory / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "model-00002-of-00002.safetensors"}))
    reader = CheckpointReader(directory)
    assert "lm_head.weight" not in reader.tensors
    assert reader.notes == ("model.safetensors.index.json lists 'lm_head.weight', which no file holds",)


def test_a_tensor_that_two_files_hold_alike_is_read(tmp_path: Path) -> None:
    """Copies are compared; equal ones do no harm."""
    directory = tiny_checkpoint(tmp_path / "m", shards=2)
    second = directory / "model-00002-of-00002.safetensors"
    held = dict(load_file(second))
    save_safetensors(second, {**held, "model.embed_tokens.weight": random_tensors(tiny_config())[EMBEDDING]})
    reader = CheckpointReader(directory)
    assert reader.notes == (
        "model.safetensors.index.json names files of which two hold 'model.embed_tokens.weight', with the same values",
    )


def test_an_index_beside_a_single_file_is_not_read(tmp_path: Path) -> None:
    """Loaders take model.safetensors where it is; a stale index beside it changes nothing."""
    directory = tiny_checkpoint(tmp_path / "m")
    (directory / INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    reader = CheckpointReader(directory)
    assert len(reader.notes) == 1
    assert "beside it is not read" in reader.notes[0]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(tmp_path: Path) -> None:
    """Transformers compares the two and does not tie what differs; a fine-tune's own head would be lost otherwise."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors({**config, "tie_word_embeddings": False})
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert reader.architecture.tie_word_embeddings is False
    assert reader.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(reader.read_outer()[HEAD], tensors[HEAD])
    (note,) = reader.notes
    assert note.startswith("lm_head.weight holds other values than model.embed_tokens.weight")


@pytest.mark.parametrize("place", [0, -1])
def test_one_different_value_makes_a_head_of_its_own(place: int, tmp_path: Path) -> None:
    """All values are compared, wherever the difference is."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD].reshape(-1)[place] += 1
    assert not CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors)).architecture.tie_word_embeddings


def test_a_copy_of_the_embedding_in_another_dtype_is_a_copy(tmp_path: Path) -> None:
    """Values are compared, not bytes, where the dtypes differ."""
    config = tiny_config(tie_word_embeddings=True, torch_dtype="bfloat16")
    tensors = random_tensors(config, "bfloat16")
    tensors[HEAD] = tensors[EMBEDDING].astype(np.float32)
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert reader.architecture.tie_word_embeddings
    assert reader.ignored == (HEAD,)
    assert reader.notes == (f"{HEAD} is equal to {EMBEDDING}, which config.json ties it to, and is left out",)


def test_a_tied_model_that_stores_the_head_alone_has_that_embedding(tmp_path: Path) -> None:
    """Transformers ties the other way round then; it is published under the embedding's name."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    wanted = tensors.pop(EMBEDDING)
    tensors[HEAD] = wanted
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert reader.architecture.tie_word_embeddings
    np.testing.assert_array_equal(reader.read_outer()[EMBEDDING], wanted)
    assert set(reader.tensors) == set(tensor_shapes(config))
    assert reader.notes[0].startswith("lm_head.weight is stored and model.embed_tokens.weight is not")


def test_everything_ignored_is_told(tmp_path: Path) -> None:
    """A name in `ignored` stands in a note."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors[HEAD] = tensors[EMBEDDING]
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert len(reader.ignored) == 2
    for name in reader.ignored:
        assert any(name in note for note in reader.notes)


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "1e999", '"\\ud800"', "[[NaN]]"])
def test_values_that_cannot_be_published_are_refused_at_once(text: str, tmp_path: Path) -> None:
    """Python reads them and no strict JSON reader would; the key is named before any work."""
    directory = tiny_checkpoint(tmp_path / "m")
    content = (directory / "config.json").read_text().rstrip().removesuffix("}")
    (directory / "config.json").write_text(f'{content}, "task_scale": {text}}}')
    with pytest.raises(CheckpointError, match=r"^config\.json: 'task_scale' holds what JSON cannot"):
        CheckpointReader(directory)


def test_a_key_that_occurs_twice_with_different_values_is_refused(tmp_path: Path) -> None:
    """Parsers differ on which of the two counts; the same value twice does no harm."""
    directory = tiny_checkpoint(tmp_path / "m")
    content = (directory / "config.json").read_text().rstrip().removesuffix("}")
    (directory / "config.json").write_text(f'{content}, "num_hidden_layers": 2}}')
    assert CheckpointReader(directory).architecture.num_layers == 2
    (directory / "config.json").write_text(f'{content}, "num_hidden_layers": 1}}')
    with pytest.raises(CheckpointError, match="key 'num_hidden_layers' occurs twice, with different values"):
        CheckpointReader(directory)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outer_tensors_are_scanned_for_what_is_not_finite(dtype: str, tmp_path: Path) -> None:
    """A row of the embedding that no sample uses would otherwise be found after all layers."""
    config = tiny_config(torch_dtype=dtype)
    tensors = random_tensors(config, dtype)
    reader = CheckpointReader(save_checkpoint(tmp_path / "sound", config, tensors))
    reader.refuse_damaged_outer()
    tensors[EMBEDDING][127, 63] = np.nan
    reader = CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' holds nan at \(127, 63\)"):
        reader.refuse_damaged_outer()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """Which of two copies would be meant cannot be known where they differ."""
    directory = tiny_checkpoint(tmp_path / "m", shards=2)
    second = directory / "model-00002-of-00002.safetensors"
    tensors = CheckpointReader(directory).read(
        [n for n, i in CheckpointReader(directory).tensors.items() if i.file == second.name]
    )
    copies = {name: np.array(array) for name, array in tensors.items()}
    save_safetensors(second, {**copies, "model.embed_tokens.weight": np.ones((128, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: holds tensor 'model\.embed_tokens\.weight'"):
        CheckpointReader(directory)


def test_links_may_not_leave_the_directory(tmp_path: Path) -> None:
    """A weight file that is a link to elsewhere is refused, one within the directory is read."""
    directory = tiny_checkpoint(tmp_path / "m")
    (directory / "real").mkdir()
    (directory / "model.safetensors").rename(directory / "real" / "w")
    (directory / "model.safetensors").symlink_to("real/w")
    assert CheckpointReader(directory).tensors
    (directory / "real" / "w").rename(tmp_path / "w")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(CheckpointError, match="points outside"):
        CheckpointReader(directory)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError):
        CheckpointReader(directory)


def test_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    """A snapshot whose files are links to blobs beside it is a checkpoint like any other."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    tiny_checkpoint(snapshot, shards=2, tokenizer=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    reader = CheckpointReader(snapshot)
    assert reader.read_layer(0)
    assert reader.tokenizer_file is not None
    linked = tmp_path / "link"
    linked.symlink_to(snapshot)
    assert CheckpointReader(linked).fingerprint() == reader.fingerprint()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "model.safetensors: neither"),
        (["pytorch_model.bin"], r"^pytorch_model\.bin: weights in pickle form are never opened"),
        (["consolidated.00.pth"], "never opened"),
        (["model-00001-of-00002.safetensors"], "index.json: is missing although"),
    ],
)
def test_a_directory_without_usable_weights(files: list[str], message: str, tmp_path: Path) -> None:
    """Pickled weights are never opened, and the message says how to convert them; a lost index is named."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    for file in files:
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_a_directory_without_config_or_none_at_all(tmp_path: Path) -> None:
    """Missing config.json and missing directory are told apart."""
    with pytest.raises(CheckpointError, match=r"^config\.json: cannot be read"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_file_changed_during_the_run_is_noticed(tmp_path: Path) -> None:
    """Reading after another header has taken the file's place is refused."""
    directory = tiny_checkpoint(tmp_path / "m")
    reader = CheckpointReader(directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(os.path.getsize(directory / "model.safetensors") // 2)
    with pytest.raises(CheckpointError, match="changed since"):
        reader.read_layer(1)
    with pytest.raises(CheckpointError, match="'nonsense' is not in the checkpoint"):
        reader.read(["nonsense"])


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Equal directories agree wherever they lie; another config, weight or layout differs."""
    prints = [
        CheckpointReader(tiny_checkpoint(tmp_path / str(number), **options)).fingerprint()
        for number, options in enumerate([{}, {}, {"seed": 1}, {"shards": 2}, {"rms_norm_eps": 1e-6}])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    with (tmp_path / "0" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert CheckpointReader(tmp_path / "0").fingerprint() != prints[0]


@pytest.mark.parametrize("name", ["quant_model_description.json", "quantization_description.json"])
def test_a_published_model_is_no_float_model(tmp_path: Path, name: str) -> None:
    """One that a description file makes quantised is refused like one with quantization_config."""
    tensors = random_tensors(tiny_config())
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((128, 64), np.int8)
    model = save_checkpoint(tmp_path / "m", tiny_config(), tensors)
    (model / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^{name} describes quantised weights .* set model to the directory of"):
        CheckpointReader(model)


def test_layers_of_multi_token_prediction_are_carried_and_said_so(tmp_path: Path) -> None:
    """They stand behind the last layer under the next number; no decoder runs them, and they are published."""
    directory = tiny_checkpoint(tmp_path / "m", "glm4_moe", num_nextn_predict_layers=1)
    tensors = CheckpointReader(directory).read(CheckpointReader(directory).tensors)
    tensors["model.layers.2.eh_proj.weight"] = np.ones((64, 128), np.float32)
    save_safetensors(directory / "model.safetensors", tensors)
    reader = CheckpointReader(directory)
    assert reader.ignored == ()
    assert reader.architecture.carried == (("model.layers.2.eh_proj.weight", (64, 128)),)
    assert reader.outer_part[-1] == "model.layers.2.eh_proj.weight"
    assert reader.outer_part[-1] in reader.tensors
    assert reader.outer_part[-1] not in reader.read_outer()
    assert any("multi-token prediction" in note for note in reader.notes)
    assert not any("frequencies" in note for note in reader.notes)
