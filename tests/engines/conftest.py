"""What the tests of engines run in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = Path(os.environ.get("GS_DIST_ENGINES", HERE.parents[1] / ".venv-engines"))


@pytest.fixture(scope="session")
def engines() -> Path:
    """The environment that `environment.sh` makes."""
    if not (ENVIRONMENT / "bin" / "python").is_file():
        pytest.skip(f"no engines in {ENVIRONMENT}: run `bash tests/engines/environment.sh`, or set GS_DIST_ENGINES")
    return ENVIRONMENT
