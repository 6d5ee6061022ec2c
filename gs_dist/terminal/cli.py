"""The command line `gs-dist`: its commands, in the order in which its help lists them.

Exit codes: 0 done, 2 something of the user's must be changed, 1 the run failed.
"""

from __future__ import annotations

from gs_dist.terminal import jobs, outputs
from gs_dist.terminal.app import app

__all__ = ["app", "jobs", "main", "outputs"]


def main() -> None:
    """Runs the command line."""
    app(prog_name="gs-dist")
