"""A family is one file: what reading it takes, and that nothing else of the package knows one by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from checkpoints import tiny_config

import gs_dist
from gs_dist.model import families
from gs_dist.model.families import FAMILIES, find_families, read_architecture

PACKAGE = Path(gs_dist.__file__).parent
# Conversion without calibration runs no forward pass: it takes models of which only names and shapes are known.
# What a release of an engine loads is told by the models that its code names.
APART = {PACKAGE / "model" / "kept_in_float.py", PACKAGE / "checkpoint" / "engines" / "vllm_ascend_cache.py"}
FAMILY = """
from gs_dist.model.families import llama

MODEL_TYPES = ("vicugna",)
read = llama.read
"""


def test_a_new_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is put into the folder is found, and a config.json of its type is read by it."""
    (tmp_path / "vicugna.py").write_text(FAMILY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    found = find_families()
    assert found.keys() - FAMILIES.keys() == {"vicugna"}
    monkeypatch.setattr(families, "FAMILIES", found)
    assert read_architecture({**tiny_config(), "model_type": "vicugna"}).num_layers == 2


def constants(path: Path) -> set[str]:
    """Text constants of a module that are not docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_file_names_a_family(path: Path) -> None:
    """Neither a constant nor an import outside of `model/families` is a family's."""
    if (path.parent == PACKAGE / "model" / "families" and path.name != "__init__.py") or path in APART:
        return
    assert not constants(path) & FAMILIES.keys()
    assert not re.search(r"model\.families(\.|\s+import\s+(?!read_architecture|FAMILIES))", path.read_text())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_alike_layers_are_one_object(name: str) -> None:
    """Layers that do not differ are described once, however many there are."""
    architecture = read_architecture(tiny_config(name, num_hidden_layers=40))
    assert len({id(layer) for layer in architecture.layers}) == len(architecture.kinds) <= 2
