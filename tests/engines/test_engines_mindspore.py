"""The readers of vLLM-MindSpore and MindFormers on what is published for them, on a CPU.

Run with `pytest -m engines tests/engines`, in the environment that `tests/engines/environment.sh` makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dialects
import pytest

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of

pytestmark = pytest.mark.engines

READERS = {"vllm-mindspore": "0.5.1", "mindformers": "2.1.0"}
# What is written: the format, the policy, more. Weights of 4 bits and W8A16 are for networks of Golden Stick itself.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "W8A8": ("golden-stick", dialects.W8A8, {}),
    "W8A8, zero points, biases": (
        "golden-stick",
        dialects.W8A8_ASYMMETRIC,
        {"model_type": "qwen2", "zero_point": 9},
    ),
    "W8A8_DYNAMIC": ("golden-stick", dialects.W8A8_DYNAMIC, {}),
    "W8A16": ("golden-stick", dialects.W8A16, {}),
    "W4A16": ("golden-stick", dialects.W4A16, {}),
    "ascend W8A8": ("ascend", dialects.W8A8, {}),
}
# Of each reader, what it refuses and in which words.
REFUSALS = {
    "vllm-mindspore": {
        "W8A8_DYNAMIC": "ValueError: Unsupported quantization strategy: W8A8_DYNAMIC for layer model.layers.0.",
        "W8A16": "ValueError: Unsupported quantization strategy: W8A16",
        "W4A16": "ValueError: Unsupported quantization strategy: W4A16",
        "ascend W8A8": "AttributeError: The 'AclnnQuantBatchMatMul' object has no attribute '_primitives'",
    },
    "mindformers": {"W8A16": "KeyError: 'W8A16'", "W4A16": "KeyError: 'W4A16'"},
}
METHODS = {"W8A8": "A8W8LinearMethod", "W8A8_DYNAMIC": "A8W8DynamicLinearMethod"}
READ = [(reader, case) for reader in READERS for case in CASES if case not in REFUSALS[reader] and "ascend" not in case]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory a case."""
    root = tmp_path_factory.mktemp("mindspore")
    for number, (dialect, policy, options) in enumerate(CASES.values()):
        dialects.save_model(root / str(number), codec_of(dialect), policy, **options)
    return root


@pytest.fixture(scope="module")
def found(engines: Path, root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What each reader made of each case; MindSpore is this environment's."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    script = Path(__file__).with_name("load_mindspore.py")
    for reader, version in READERS.items():
        package = engines / f"{reader}-{version}"
        if not package.is_dir():
            pytest.skip(f"no {package.name} in {engines}: run `bash tests/engines/environment.sh` again")
        command = [sys.executable, str(script), reader, str(package), *(str(root / str(n)) for n in range(len(CASES)))]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == len(CASES), result.stderr[-3000:]
        found |= {(reader, case): line for case, line in zip(CASES, lines, strict=True)}
    return found


@pytest.mark.parametrize(("reader", "case"), READ)
def test_every_parameter_has_its_tensor(found: dict[tuple[str, str], dict[str, Any]], reader: str, case: str) -> None:
    """Of every linear, fused ones included, by name, dtype and shape; the method is that of the label."""
    linears = found[reader, case]["linears"]
    assert len(linears) == 8
    assert [text for linear in linears for text in linear["misfits"]] == []
    assert {linear["method"] for linear in linears} == {METHODS[case.partition(",")[0]]}
    print(f"| {reader} {READERS[reader]} | {case} | {sum(linear['allocated'] for linear in linears)} | all |")


@pytest.mark.parametrize(("reader", "case"), [(reader, case) for reader in REFUSALS for case in REFUSALS[reader]])
def test_what_a_reader_refuses_is_refused_in_these_words(
    found: dict[tuple[str, str], dict[str, Any]], reader: str, case: str
) -> None:
    """They are what `gs-dist check --for` says of it beforehand."""
    assert found[reader, case]["refused"].startswith(REFUSALS[reader][case])


@pytest.mark.parametrize("reader", READERS)
def test_the_checker_says_the_same(root: Path, reader: str) -> None:
    """Clean where every parameter has its tensor, an engine's rule broken where the reader refuses."""
    for number, case in enumerate(CASES):
        rules = {problem.rule for problem in check(root / str(number), reader).problems}
        assert bool(rules) == ((reader, case) not in READ), (case, rules)
        assert rules <= {"engine-kind", "engine-format"}
