"""How tests are dealt to processes (`pytest -n 2 --dist loadgroup`, as in run.sh), and what hypothesis may do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent

# How long an example takes tells of the machine, and of what else it does.
settings.register_profile("gs_dist", deadline=None)
settings.load_profile("gs_dist")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray stay in one process: two clusters at once would time out on a small machine.

    Files that share a finished job among their tests stay together, so that it is run once.
    """
    for item in items:
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif not item.path.is_relative_to(TESTS / "unit") or item.path.parent.name in ("runtime", "ptq", "calibration"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
