"""The tree is the diagram: imports go one way, each framework stays in its rooms, and names have one spelling."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gs_dist.recipe.dialects import DIALECTS

PACKAGE = Path(__file__).parents[2] / "gs_dist"
JOBS = Path(__file__).parents[2] / "jobs"
TESTS = Path(__file__).parents[1]

# Which rooms each room may import, itself included, lowest first. `words` are the loose modules at the top of the
# package: what every room may say.
PLAIN = {"words", "model", "numbers", "methods", "recipe", "results"}
ALLOWED = {
    "words": {"words"},
    "model": {"words", "model"},
    "numbers": {"words", "model", "numbers"},
    "methods": {"words", "model", "numbers", "methods"},
    "recipe": {"words", "model", "numbers", "methods", "recipe"},
    "results": PLAIN,
    "report": PLAIN | {"report"},
    "planning": PLAIN | {"planning"},
    "solvers": PLAIN | {"solvers"},
    "checkpoint": PLAIN | {"checkpoint"},
    "data": {"words", "recipe", "data"},
    "calibration": PLAIN | {"solvers", "checkpoint", "data", "calibration"},
    "ptq": PLAIN | {"solvers", "checkpoint", "data", "calibration", "ptq"},
    "golden_stick": PLAIN | {"ptq", "golden_stick"},
    "conversion": PLAIN | {"planning", "solvers", "checkpoint", "conversion"},
    "runtime": PLAIN | {"planning", "solvers", "checkpoint", "data", "calibration", "conversion", "report", "runtime"},
    "terminal": PLAIN | {"planning", "checkpoint", "data", "ptq", "conversion", "report", "runtime", "terminal"},
}
LOOSE_MODULES = {"__init__", "__main__", "errors", "processor", "progress", "seal", "storage", "wording"}
FRAMEWORKS = {
    "ray": ("runtime/worker_group.py", "runtime/cluster.py", "runtime/conversion_workers.py"),
    "mindspore": ("calibration/", "ptq/"),
    "pyarrow": ("data/", "results/summary.py"),
    "jinja2": ("data/", "report/page_templates.py"),
    "vl_convert": ("report/vega.py",),
    "torch": (),
    "transformers": (),
    "pickle": (),
}


def modules() -> dict[str, ast.Module]:
    """Dotted name to syntax tree of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("gs_dist", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def room(module: str) -> str:
    """The room a module of the package belongs to."""
    parts = module.split(".")
    if len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "terminal" if parts[1:] == ["__main__"] else "words"


def imported(tree: ast.Module, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `at_import` only those that importing it runs."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        pending.extend(ast.iter_child_nodes(node))


def file_of(module: str) -> str:
    """A module's path below the package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    """Imports go one way, down the table of rooms."""
    ours = {name for name in imported(MODULES[module]) if name.split(".")[0] == "gs_dist"}
    above = {name for name in ours if room(name) not in ALLOWED[room(module)]}
    assert not above, f"{module} imports {sorted(above)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_framework_is_imported_only_in_its_rooms(module: str) -> None:
    """Ray, MindSpore and Arrow each have a few files that know of them; pickle has none."""
    for name in imported(MODULES[module]):
        places = FRAMEWORKS.get(name.split(".")[0])
        assert places is None or file_of(module).startswith(places), f"{module} imports {name}"


def test_no_module_imports_itself_through_others() -> None:
    """There is no cycle of imports, not even one that a function body hides."""
    # A package's __init__ re-exports its modules; importing one of them is no dependence on the others.
    graph = {
        module: {name for name in imported(tree) if name in MODULES and name != module}
        for module, tree in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for name in sorted(graph[module]):
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_command_line_imports_no_heavy_package_at_start() -> None:
    """`gs-dist plan` reaches neither Ray, MindSpore nor Arrow, through whatever it imports at start."""
    reached: set[str] = set()
    pending = ["gs_dist.terminal.cli", "gs_dist.checkpoint.reader", "gs_dist.checkpoint.dialects"]
    pending += [f"{dialect.home}.{part}" for dialect in DIALECTS.values() for part in ("codec", "layout")]
    while pending:
        module = pending.pop()
        if module in reached:
            continue
        reached.add(module)
        for name in imported(MODULES[module], at_import=True):
            assert name.split(".")[0] not in {"ray", "mindspore", "pyarrow", "scipy", "jinja2", "vl_convert"}, (
                f"{module} imports {name}"
            )
            if name in MODULES:
                pending.append(name)


def test_entry_points_use_the_package_only_from_above() -> None:
    """Nothing in the package imports what one submits."""
    for module, tree in MODULES.items():
        assert not [name for name in imported(tree) if name.split(".")[0] == "jobs"], module
    assert JOBS.is_dir()


def test_every_room_of_the_package_is_known() -> None:
    """A new folder has to be given its place in the order."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ALLOWED) - {"words"}


def test_only_what_every_room_says_lies_loose_at_the_top_of_the_package() -> None:
    """A new noun has a room; the top is no place to leave it."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE_MODULES


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_checker_knows_nothing_of_the_writer_that_it_checks(dialect: str) -> None:
    """A dialect's layout reaches no codec, nor what codecs share, through whatever it imports: a second opinion."""
    writers = {name for name in MODULES if ".dialects." in name and not name.endswith(".layout")}
    reached: set[str] = set()
    pending = [f"{DIALECTS[dialect].home}.layout"]
    while pending:
        module = pending.pop()
        assert module not in writers, f"the layout of {dialect} reaches {module}"
        found = {name for name in imported(MODULES[module]) if name in MODULES} - reached
        reached |= found
        pending.extend(found)


def test_the_fast_lane_leaves_out_the_rooms_that_start_a_framework_and_no_other_test_reaches_one() -> None:
    """What `tests/run.sh --fast` runs imports neither Ray nor MindSpore, itself or through what tests share."""
    lane = re.search(r"for room in (.*); do", (TESTS / "run.sh").read_text())
    assert lane is not None
    left_out = [TESTS / name for name in lane[1].split()]
    assert {path.name for path in left_out} == {"engines", "integration", "calibration", "ptq", "runtime", "terminal"}
    shared = {path.stem: ast.parse(path.read_text()) for path in TESTS.glob("*.py")}
    further = {name: {*imported(tree, at_import=True)} for name, tree in {**MODULES, **shared}.items()}
    for path in TESTS.glob("**/test_*.py"):
        if path.parent in left_out:
            continue
        reached: set[str] = set()
        pending = {*imported(ast.parse(path.read_text()), at_import=True)}
        while pending:
            name = pending.pop()
            reached.add(name)
            pending |= further.get(name, set()) - reached
        assert not {name.split(".")[0] for name in reached} & {"ray", "mindspore"}, path


# A word of a name in small letters or in capitals, between underscores and humps.
ISE = re.compile(
    r"[A-Z]?[a-z]+is(?:e|es|ed|er|ing|able|ations?)(?![a-z])|[A-Z]+IS(?:E|ES|ED|ER|ING|ABLE|ATIONS?)(?![A-Z])"
)
# These are never spelt otherwise.
ALWAYS_ISE = {
    *(
        "raise",
        "raises",
        "raised",
        "raising",
        "advise",
        "madvise",
        "fadvise",
        "promise",
        "promises",
        "promised",
        "disable",
    ),
    *("noise", "precise", "premises", "rises", "likewise", "otherwise", "bitwise", "elementwise", "pairwise"),
}
COMMENT_OR_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])*'|#[^\n]*", re.DOTALL
)


def words(text: str) -> set[str]:
    """Words with -ise in the identifiers of a module; its comments and strings are prose, which has -ise."""
    return {word for word in ISE.findall(COMMENT_OR_STRING.sub(" ", text)) if word.lower() not in ALWAYS_ISE}


def test_a_name_in_ise_is_found_and_prose_is_none() -> None:
    """In whatever case, as a part or the whole; not in comments and strings, nor where there is no other spelling."""
    text = "def dequantised(x): raise Normalise(_QUANTISES, noise, x.is_initialised)  # quantised\n'summarise'\n"
    assert words(text) == {"dequantised", "Normalise", "QUANTISES", "initialised"}


def test_names_are_spelt_as_those_of_libraries_are() -> None:
    """`quantize`, never `quantize`: one spelling beside NumPy's, transformers' and MindSpore's own names."""
    modules = [path for folder in (PACKAGE, TESTS, JOBS) for path in folder.rglob("*.py")]
    found = {path: wrong for path in modules if (wrong := words(path.read_text(encoding="utf-8")))}
    assert not found, f"spell these -ize: {found}"
