"""Bad input of every kind, through the command line: exit code 2, one message that names the culprit, nothing touched.

Run as a script, this module prints the table of cases and messages:
`PYTHONPATH=tests python tests/integration/test_integration_bad_input.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from checkpoints import raw_safetensors, save_tokenizer, tiny_checkpoint
from typer.testing import CliRunner, Result

from gs_dist.terminal.cli import app

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
A_LINEAR = "model.layers.1.mlp.up_proj.weight"


@dataclass
class Place:
    """A good model, good samples and a good recipe in a directory; a case spoils one of them."""

    directory: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    command: list[str] | None = None

    @classmethod
    def make(cls, directory: Path) -> Place:
        place = cls(directory)
        tiny_checkpoint(place.model)
        save_tokenizer(place.model)
        place.save_rows([list(range(32))] * 8)
        place.recipe = {
            "model": str(place.model),
            "output": str(place.output),
            "calibration": {"data": str(place.data), "num_samples": 8, "sequence_length": 32, "micro_batch_size": 2},
            "ptq": {"weight_quant_dtype": "int8"},
            "parallel": {"threads_per_worker": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        }
        place.save_recipe()
        return place

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def data(self) -> Path:
        return self.directory / "samples.parquet"

    @property
    def output(self) -> Path:
        return self.directory / "out"

    @property
    def recipe_file(self) -> Path:
        return self.directory / "recipe.yaml"

    def save_recipe(self) -> None:
        self.recipe_file.write_text(yaml.safe_dump(self.recipe))

    def save_rows(self, rows: list[Any], column: str = "input_ids", kind: pa.DataType | None = None) -> None:
        pq.write_table(pa.table({column: pa.array(rows, kind or pa.list_(pa.int64()))}), self.data)

    def set(self, path: str, value: Any) -> None:
        """A value of the recipe, by key path."""
        *sections, key = path.split(".")
        table = self.recipe
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
        self.save_recipe()

    def config(self, **changes: Any) -> None:
        """Keys of config.json; None removes one."""
        path = self.model / "config.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the header of the weights."""
        data = (self.model / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        (self.model / WEIGHTS).write_bytes(raw_safetensors(entries, data[8 + length :]))

    def entry(self, **changes: Any) -> None:
        """Changes one tensor's entry in the header."""
        self.header(lambda entries: entries[A_LINEAR].update(changes))

    def shards(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Splits the weights over two files and changes the index."""
        shutil.rmtree(self.model)
        tiny_checkpoint(self.model, shards=2)
        index = json.loads((self.model / INDEX).read_text())
        change(index)
        (self.model / INDEX).write_text(json.dumps(index))

    def bytes(self, data: bytes) -> None:
        (self.model / WEIGHTS).write_bytes(data)


Change = Callable[[Place], Any]


@dataclass(frozen=True)
class Case:
    """What is spoilt, how, and a part of the message that no other case has."""

    room: str
    name: str
    change: Change
    says: str


def _recipe(text: str | bytes) -> Change:
    return lambda p: p.recipe_file.write_bytes(text if isinstance(text, bytes) else text.encode())


def _set(path: str, value: Any) -> Change:
    return lambda p: p.set(path, value)


def _override(text: str) -> Change:
    return lambda p: p.overrides.append(text)


def _config(**changes: Any) -> Change:
    return lambda p: p.config(**changes)


def _file(name: str, data: str | bytes) -> Change:
    return lambda p: (p.model / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def _unlink(name: str) -> Change:
    return lambda p: (p.model / name).unlink()


def _rows(rows: list[Any], **more: Any) -> Change:
    def change(p: Place) -> None:
        p.save_rows(rows, **more)

    return change


def _command(*args: str) -> Change:
    def change(p: Place) -> None:
        p.command = [arg.format(directory=p.directory, model=p.model, data=p.data, output=p.output) for arg in args]

    return change


def _address(address: str) -> Change:
    return lambda p: p.options.extend(["--address", address])


def _all(*changes: Change) -> Change:
    def change(p: Place) -> None:
        for each in changes:
            each(p)

    return change


def _header_length(length: int) -> Change:
    return lambda p: p.bytes(struct.pack("<Q", length) + (p.model / WEIGHTS).read_bytes()[8:])


def _raw_header(text: bytes) -> Change:
    return lambda p: p.bytes(struct.pack("<Q", len(text)) + text)


def _truncated(p: Place) -> None:
    p.bytes((p.model / WEIGHTS).read_bytes()[:-100])


def _longer(p: Place) -> None:
    p.bytes((p.model / WEIGHTS).read_bytes() + b"\0" * 100)


def _renamed(entries: dict[str, Any]) -> None:
    entries["model.layers.1.mlp.up.weight"] = entries.pop(A_LINEAR)


def _overlap(entries: dict[str, Any]) -> None:
    names = [name for name in entries if name != "__metadata__"]
    first, second = entries[names[1]], entries[names[2]]
    second["data_offsets"] = [
        first["data_offsets"][0],
        first["data_offsets"][0] + np.diff(second["data_offsets"]).item(),
    ]


def _gap(entries: dict[str, Any]) -> None:
    del entries[A_LINEAR]


def _link_outside(p: Place) -> None:
    (p.directory / "elsewhere").mkdir()
    shutil.move(p.model / WEIGHTS, p.directory / "elsewhere" / WEIGHTS)
    (p.model / WEIGHTS).symlink_to(p.directory / "elsewhere" / WEIGHTS)


def _pickled(p: Place) -> None:
    (p.model / WEIGHTS).unlink()
    (p.model / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _huge_json(p: Place) -> None:
    with (p.model / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte


def _corrupt_footer(p: Place) -> None:
    data = bytearray(p.data.read_bytes())
    data[-40:-8] = b"\xff" * 32
    p.data.write_bytes(bytes(data))


def _corrupt_page(p: Place) -> None:
    data = bytearray(p.data.read_bytes())
    data[4:24] = b"\xff" * 20
    p.data.write_bytes(bytes(data))


def _cut_parquet(p: Place) -> None:
    p.data.write_bytes(p.data.read_bytes()[:-20])


def _cut_arrow(p: Place) -> None:
    table = pa.table({"input_ids": pa.array([list(range(32))] * 8)})
    with pa.ipc.new_stream(p.directory / "samples.arrow", table.schema) as stream:
        stream.write_table(table)
    data = (p.directory / "samples.arrow").read_bytes()
    (p.directory / "samples.arrow").write_bytes(data[: len(data) // 2])
    p.set("calibration.data", str(p.directory / "samples.arrow"))


def _directory_of_nothing(p: Place) -> None:
    (p.directory / "empty").mkdir()
    p.set("calibration.data", str(p.directory / "empty"))


def _long_sequence(p: Place) -> None:
    p.save_rows([[1] * 8192] * 8)
    p.set("calibration.sequence_length", 8192)


def _text(p: Place) -> None:
    p.save_rows(["some words " * 100] * 8, column="text", kind=pa.string())


def _foreign(p: Place) -> None:
    p.output.mkdir()
    (p.output / "thesis.tex").write_text("precious")


def _output_is_a_file(p: Place) -> None:
    p.output.write_text("precious")


def _output_below_a_file(p: Place) -> None:
    (p.directory / "file").write_text("precious")
    p.set("output", str(p.directory / "file" / "out"))


def _manifest(content: str) -> Change:
    def change(p: Place) -> None:
        (p.output / "manifests").mkdir(parents=True)
        (p.output / "manifests" / "layer-00000.json").write_text(content)

    return change


OTHER_RUN = json.dumps(
    {
        "version": 1,
        "layer": 0,
        "fingerprints": {"recipe": "a", "source": "b", "data": "c"},
        "shards": {},
        "policies": {},
        "kv_cache": None,
        "rows": [],
    }
)
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(8)
)

CASES = [
    # The recipe.
    Case("recipe", "file missing", lambda p: p.recipe_file.unlink(), r"recipe.yaml cannot be read: No such file"),
    Case(
        "recipe",
        "is a directory",
        lambda p: (p.recipe_file.unlink(), p.recipe_file.mkdir()),
        "a directory without config.json",
    ),
    Case("recipe", "binary", _recipe(b"\xff\xfe\x00model"), "not UTF-8 text"),
    Case("recipe", "empty", _recipe(""), "model: missing; this key is required"),
    Case("recipe", "bytes that YAML refuses", _recipe("model: \0"), "line|NUL|special characters"),
    Case("recipe", "broken YAML", _recipe("model: [a\noutput: b"), "line 2, column"),
    Case("recipe", "a list", _recipe("- model\n- output"), "at the top"),
    Case("recipe", "a key twice", _recipe("model: a\nmodel: b"), "'model' stands twice, first in line 1"),
    Case("recipe", "alias bomb", _recipe(BOMB), "levels or 100000 values"),
    Case("recipe", "an alias of itself", _recipe("a: &a [*a]"), "levels or|recursive"),
    Case("recipe", "two megabytes", _recipe("# " + "x" * (2 << 20)), "more than 1048576 bytes"),
    Case("recipe", "an object to be made", _recipe("model: !!python/object:os.system {}"), "python/object"),
    Case("recipe", "nested a thousand deep", _recipe("a: " + "[" * 1000 + "]" * 1000), "levels or|cannot be read"),
    Case("recipe", "misspelt key", _set("calibration.num_sample", 8), "calibration.num_sample: .*num_samples"),
    Case("recipe", "unknown section", _set("optimizer", {}), "optimizer: found an unknown key"),
    Case("recipe", "no samples", _set("calibration.num_samples", 0), "num_samples: found 0; write at least 1"),
    Case("recipe", "text for a number", _set("calibration.num_samples", "all"), "found 'all'; write a whole number"),
    Case("recipe", "negative length", _set("calibration.sequence_length", -1), "sequence_length: found -1"),
    Case("recipe", "half a token", _set("calibration.sequence_length", 12.5), "sequence_length: found 12.5"),
    Case("recipe", "blocks no power of two", _set("calibration.reduction_blocks", 3), "a power of two"),
    Case("recipe", "unknown dtype", _set("ptq.weight_quant_dtype", "int3"), "weight_quant_dtype: found 'int3'"),
    Case("recipe", "activations alone", _set("ptq", {"weight_quant_dtype": None, "act_quant_dtype": "int8"}), "ptq: "),
    Case("recipe", "nothing to quantise", _set("ptq", {"weight_quant_dtype": None}), "nothing|quantise"),
    Case(
        "recipe",
        "all blacklisted",
        _set("ptq.opname_blacklist", ["proj"]),
        "leave every linear of the decoder layers unquantised",
    ),
    Case(
        "recipe",
        "group size of no power",
        _set("ptq", {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 48}),
        "group_size.*48|48.*group_size",
    ),
    Case("recipe", "pattern that does not compile", _set("layer_policies", {"*": None}), "regular expression"),
    Case("recipe", "pattern that matches nothing", _set("layer_policies", {"nobody": None}), "nobody"),
    Case("recipe", "two policies on one linear", _set("layer_policies", {".*up.*": None, ".*proj": None}), "up_proj"),
    Case("recipe", "unknown format", _set("format", "gguf"), "format: found 'gguf'"),
    Case("recipe", "output in the model", lambda p: p.set("output", str(p.model / "out")), "outside the model's"),
    Case("recipe", "contradictory replicas", _set("parallel.min_data_parallel_size", 5), "min_data_parallel_size is 5"),
    Case("recipe", "size without unit", _set("parallel.memory_per_worker", "60 gigs"), "such as 60GiB"),
    Case("recipe", "endless wait", _set("parallel.timeout", float("inf")), "timeout"),
    Case("recipe", "ceiling below zero", _set("max_relative_error", -1.0), "max_relative_error: found -1.0"),
    Case("recipe", "a probe without a limit", _set("probe.num_samples", 4), "max_perplexity_increase is null"),
    Case("recipe", "override without value", _override("calibration.num_samples"), "write key.path=value"),
    Case("recipe", "override of nothing", _override("calibration.nun_samples=3"), "num_samples if that is meant"),
    # What the plan refuses.
    Case("plan", "no memory", _set("parallel.memory_per_worker", "1MiB"), "memory_per_worker|GiB|MiB"),
    Case("plan", "more stages than layers", _set("parallel.pipeline_parallel_size", 9), "pipeline_parallel_size"),
    Case("plan", "more replicas than samples", _set("parallel.data_parallel_size", 64), "data_parallel_size"),
    Case("plan", "sequence longer than the model's", _long_sequence, "sequence_length is 8192.*4096"),
    # config.json.
    Case("config.json", "directory missing", lambda p: shutil.rmtree(p.model), "is not a directory"),
    Case("config.json", "missing", _unlink("config.json"), "config.json: cannot be read"),
    Case("config.json", "empty", _file("config.json", ""), "config.json: is not valid JSON"),
    Case("config.json", "a list", _file("config.json", "[]"), "config.json: holds a JSON list"),
    Case("config.json", "nested a million deep", _file("config.json", "[" * 10**6), "config.json: is not valid JSON"),
    Case("config.json", "a terabyte", _huge_json, "config.json: has more than"),
    Case("config.json", "another architecture", _config(model_type="gpt2"), "model_type.*gpt2"),
    Case("config.json", "no hidden_size", _config(hidden_size=None), "hidden_size"),
    Case("config.json", "text for a number", _config(hidden_size="64"), "hidden_size.*'64'"),
    Case("config.json", "no layers", _config(num_hidden_layers=0), "num_hidden_layers"),
    Case("config.json", "a billion layers", _config(num_hidden_layers=10**9), "num_hidden_layers|lacks"),
    Case("config.json", "a layer too many", _config(num_hidden_layers=3), r"lacks 'model.layers.2"),
    Case("config.json", "a layer too few", _config(num_hidden_layers=1), "num_hidden_layers is 1"),
    Case("config.json", "heads that do not divide", _config(num_attention_heads=5), "num_attention_heads"),
    Case("config.json", "KV heads that do not divide", _config(num_key_value_heads=3), "num_key_value_heads"),
    Case("config.json", "another activation", _config(hidden_act="relu6"), "hidden_act"),
    Case("config.json", "unknown rotary scaling", _config(rope_scaling={"rope_type": "magic"}), "magic"),
    Case("config.json", "epsilon of infinity", _config(rms_norm_eps=float("inf")), "rms_norm_eps"),
    Case("config.json", "already quantised", _config(quantization_config={"bits": 4}), "quantization_config"),
    Case("config.json", "another vocabulary", _config(vocab_size=4096), r"embed_tokens.weight' has shape \(128, 64\)"),
    # The index.
    Case(
        "index", "not JSON", _all(lambda p: p.shards(lambda i: i), _file(INDEX, "{")), "index.json: is not valid JSON"
    ),
    Case("index", "no map", lambda p: p.shards(lambda i: i.pop("weight_map")), "weight_map must map"),
    Case("index", "an empty map", lambda p: p.shards(lambda i: i["weight_map"].clear()), "weight_map must map"),
    Case(
        "index",
        "climbs out",
        lambda p: p.shards(lambda i: i["weight_map"].update({A_LINEAR: "../x.safetensors"})),
        r"\.\./x",
    ),
    Case(
        "index",
        "absolute path",
        lambda p: p.shards(lambda i: i["weight_map"].update({A_LINEAR: "/etc/x.safetensors"})),
        "/etc/x.safetensors' points outside",
    ),
    Case(
        "index",
        "a pickle",
        lambda p: p.shards(lambda i: i["weight_map"].update({A_LINEAR: "x.bin"})),
        "not a .safetensors file",
    ),
    Case(
        "index",
        "a missing file",
        lambda p: p.shards(lambda i: i["weight_map"].update({A_LINEAR: "x.safetensors"})),
        "x.safetensors: is listed",
    ),
    Case(
        "index", "files but no index", _all(lambda p: p.shards(lambda i: i), _unlink(INDEX)), "index.json: is missing"
    ),
    # safetensors.
    Case("safetensors", "missing", _unlink(WEIGHTS), "model.safetensors: neither it nor"),
    Case("safetensors", "empty", lambda p: p.bytes(b""), WEIGHTS),
    Case("safetensors", "header longer than the file", _header_length(1 << 26), "model.safetensors: .*header"),
    Case("safetensors", "header of two terabytes", _header_length(2 << 40), "model.safetensors: .*header"),
    Case("safetensors", "header shorter than it is", _header_length(100), "model.safetensors: .*JSON"),
    Case("safetensors", "header no JSON", _raw_header(b"{nonsense"), "model.safetensors: .*JSON"),
    Case("safetensors", "header a list", _raw_header(b"[]"), "header does not start with"),
    Case("safetensors", "header with a key twice", _raw_header(b'{"a":{},"a":{}}'), "'a'"),
    Case("safetensors", "header not UTF-8", _raw_header(b'{"\xff": 1}'), "model.safetensors: "),
    Case(
        "safetensors",
        "tensor of two terabytes",
        lambda p: p.entry(shape=[1 << 20, 1 << 19], data_offsets=[0, 2 << 40]),
        A_LINEAR,
    ),
    Case("safetensors", "shape that overflows", lambda p: p.entry(shape=[1 << 62, 1 << 62]), A_LINEAR),
    Case("safetensors", "overlapping tensors", lambda p: p.header(_overlap), "overlap"),
    Case(
        "safetensors", "gap between tensors", lambda p: p.header(_gap), "model.safetensors: .*(gap|hole|between|bytes)"
    ),
    Case("safetensors", "begin after end", lambda p: p.entry(data_offsets=[64, 0]), A_LINEAR),
    Case("safetensors", "negative offset", lambda p: p.entry(data_offsets=[-4, 0]), A_LINEAR),
    Case("safetensors", "negative shape", lambda p: p.entry(shape=[-128, -64]), A_LINEAR),
    Case("safetensors", "unknown dtype", lambda p: p.entry(dtype="F12"), "F12"),
    Case("safetensors", "dtype of another size", lambda p: p.entry(dtype="F16"), A_LINEAR),
    Case("safetensors", "transposed", lambda p: p.entry(shape=[64, 128]), r"has shape \(64, 128\)"),
    Case("safetensors", "integers for weights", lambda p: p.entry(dtype="I32"), "is of quantised weights"),
    Case("safetensors", "data cut off", _truncated, "model.safetensors: "),
    Case("safetensors", "data too long", _longer, "model.safetensors: "),
    Case("safetensors", "a tensor renamed", lambda p: p.header(_renamed), "lacks 'model.layers.1.mlp.up_proj.weight'"),
    Case("safetensors", "link out of the directory", _link_outside, "points outside"),
    Case("safetensors", "pickle only", _pickled, "pytorch_model.bin: weights in pickle form"),
    # Arrow data.
    Case("arrow", "file missing", lambda p: p.data.unlink(), "nothing at .*samples.parquet"),
    Case("arrow", "directory of nothing", _directory_of_nothing, "nothing at|no file|empty"),
    Case(
        "arrow",
        "pattern that matches nothing",
        _set("calibration.data", "/nowhere/*.arrow"),
        r"nothing at /nowhere/\*.arrow",
    ),
    Case("arrow", "empty file", lambda p: p.data.write_bytes(b""), "samples.parquet"),
    Case("arrow", "a text file", lambda p: p.data.write_text("hello, world\n" * 100), "samples.parquet"),
    Case("arrow", "corrupt footer", _corrupt_footer, "samples.parquet cannot be read"),
    Case("arrow", "corrupt page", _corrupt_page, "samples.parquet"),
    Case("arrow", "cut off (Parquet)", _cut_parquet, "samples.parquet"),
    Case("arrow", "cut off (IPC stream)", _cut_arrow, "samples.arrow"),
    Case("arrow", "zero rows", _rows([]), "no samples of 32 tokens|no rows"),
    Case("arrow", "too few samples", _rows([list(range(32))] * 3), "3 samples of 32 tokens .*asks for 8"),
    Case("arrow", "wrong column", _set("calibration.column", "tokens"), "tokens"),
    Case("arrow", "no column that serves", _rows([1.5] * 8, column="score", kind=pa.float64()), "score"),
    Case("arrow", "a column of floats", _rows([[0.5] * 32] * 8, kind=pa.list_(pa.float32())), "input_ids"),
    Case(
        "arrow",
        "a null row",
        _all(_rows([[1] * 32] * 7 + [None]), _set("calibration.strict", True)),
        "row 7: input_ids is null",
    ),
    Case("arrow", "a null id", _rows([[1] * 31 + [None]] * 8), "row 0: input_ids holds a null"),
    Case("arrow", "a negative id", _rows([[1] * 32] * 5 + [[-1] * 32] * 3), "row 5: token id -1 is outside"),
    Case("arrow", "an id too large", _rows([[1] * 32] * 5 + [[128] * 32] * 3), "row 5: token id 128 is outside"),
    Case("arrow", "an id beyond 32 bits", _rows([[1 << 40] * 32] * 8), "token id 1099511627776"),
    Case(
        "arrow",
        "an empty row",
        _all(_rows([[1] * 32] * 7 + [[]]), _set("calibration.packing", False)),
        "row 7: no token",
    ),
    Case("arrow", "ragged and too short", _rows([[1] * n for n in range(8)]), "no samples of 32 tokens|0 samples"),
    Case("arrow", "a file twice", lambda p: p.set("calibration.data", [str(p.data)] * 2), "named twice"),
    Case(
        "arrow",
        "unknown scheme",
        _set("calibration.data", "gopher://u:s3cret@host/x?key=s3cret"),
        r"gopher://\*\*\*@host/x",
    ),
    # The tokenizer.
    Case("tokenizer", "missing", _all(_text, _unlink("tokenizer.json")), "tokenizer.json"),
    Case("tokenizer", "not JSON", _all(_text, _file("tokenizer.json", "{")), "tokenizer.json"),
    Case("tokenizer", "another JSON", _all(_text, _file("tokenizer.json", '{"a": 1}')), "tokenizer.json"),
    Case(
        "tokenizer",
        "link out of the directory",
        _all(_text, _unlink("tokenizer.json"), lambda p: (p.model / "tokenizer.json").symlink_to("/etc/passwd")),
        "tokenizer.json': points outside",
    ),
    Case(
        "tokenizer",
        "of a larger vocabulary",
        _all(
            _text,
            lambda p: (shutil.rmtree(p.model), tiny_checkpoint(p.model, vocab_size=48), save_tokenizer(p.model, 128)),
        ),
        "the model has embeddings for 48 tokens",
    ),
    # The cluster.
    Case("cluster", "no NPU", _set("parallel.device", "ascend"), "NPU|ascend"),
    Case("cluster", "no one listens", _address("127.0.0.1:1"), r"answers at '127.0.0.1:1' \(Connection refused\)"),
    Case("cluster", "no client server", _address("ray://127.0.0.1:1"), r"answers at 'ray://127.0.0.1:1' \("),
    Case("cluster", "a port that is none", _address("127.0.0.1:99999"), r"answers at '127.0.0.1:99999' \("),
    Case("cluster", "a name that is none", _address("nowhere.invalid:6379"), r"answers at 'nowhere.invalid:6379' \("),
    # The output.
    Case("output", "holds something else", _foreign, "holds 'thesis.tex'"),
    Case("output", "is a file", _output_is_a_file, "out.*(not a directory|cannot be)"),
    Case("output", "below a file", _output_below_a_file, "cannot be"),
    Case(
        "output",
        "in a place that nobody can write",
        _set("output", "/proc/gs-dist/out"),
        "/proc/gs-dist/out.* cannot be",
    ),
    Case("output", "a run of another version", _manifest(OTHER_RUN), "layer-00000.json: has no checksum, so it is of"),
    Case("output", "a manifest of another kind", _manifest("{}"), "layer-00000.json: has no checksum, so it is of"),
    # The other commands.
    Case(
        "evaluate", "no model there", _command("evaluate", "{directory}", "--data", "{data}"), "holds no finished model"
    ),
    Case(
        "evaluate",
        "the float model",
        _command("evaluate", "{model}", "--data", "{data}"),
        "no finished model|not quantised",
    ),
    Case("summary", "no summary there", _command("summary", "{directory}"), "summary"),
    Case(
        "summary",
        "damaged",
        _all(
            lambda p: (p.output.mkdir(), (p.output / "summary.json").write_text("{")), _command("summary", "{output}")
        ),
        "summary.json",
    ),
    Case(
        "resolve",
        "no statistics kept",
        _all(lambda p: p.output.mkdir(), _command("resolve", "{output}", "{directory}/recipe.yaml")),
        "no kept statistics",
    ),
    Case("check", "the float model", _command("check", "{model}"), "quant"),
    Case("check", "nothing there", _command("check", "{directory}/nowhere"), "nowhere"),
]


def files_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with size and content (of huge ones the first part)."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = (path.stat().st_size, file.read(1 << 20))
    return found


def run(place: Place) -> Result:
    """The command line in this process; starting Ray would be a fault of its own."""
    command = place.command or ["quantize", str(place.recipe_file), *place.overrides, *place.options]
    with mock.patch.object(ray, "init", side_effect=AssertionError("Ray was started")):
        return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def message(result: Result) -> str:
    """What was said, without progress."""
    quiet = ("reading the calibration samples", "calibration.column is auto")
    return "\n".join(line for line in result.output.splitlines() if not line.startswith(quiet))


def table(places: Callable[[], Place]) -> Iterator[tuple[Case, Result]]:
    for case in CASES:
        place = places()
        case.change(place)
        yield case, run(place)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    Place.make(directory)
    return directory


def copied(good: Path, directory: Path) -> Place:
    """The good place again, in a directory of its own."""
    place = Place(
        directory, recipe=yaml.safe_load((good / "recipe.yaml").read_text().replace(str(good), str(directory)))
    )
    shutil.copytree(good, directory, dirs_exist_ok=True)
    place.save_recipe()
    return place


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.room}: {case.name}")
def test_bad_input_ends_with_exit_code_2_and_one_message(good: Path, tmp_path: Path, case: Case) -> None:
    """The culprit is named, no process is started, and every file is as it was."""
    place = copied(good, tmp_path)
    case.change(place)
    before = files_of(tmp_path)
    result = run(place)
    said = message(result)
    assert result.exit_code == 2, said
    assert re.search(case.says, said), said
    assert "Traceback" not in said
    assert place.command is not None or said.count("gs-dist: ") == 1
    assert len(said) < 1500
    assert "s3cret" not in said
    after = files_of(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert not set(after) - set(before) - {"out/.lock"}, "nothing new"


def test_there_are_at_least_eighty_cases() -> None:
    """The table is as long as it is meant to be, and no case stands twice."""
    names = {(case.room, case.name) for case in CASES}
    assert len(names) == len(CASES) >= 80


def test_the_good_place_is_good(good: Path, tmp_path: Path) -> None:
    """What the cases spoil would have run: it is refused by nothing before Ray is started."""
    result = run(copied(good, tmp_path))
    assert "Ray was started" in result.output


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        numbers = iter(range(1000))
        for case, result in table(lambda: Place.make(Path(scratch) / f"{next(numbers):03d}")):
            said = " ".join(message(result).replace(scratch, "").split())
            print(f"| {case.room} | {case.name} | {result.exit_code} | {said} |")
