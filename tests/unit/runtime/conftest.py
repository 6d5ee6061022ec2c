"""Jobs of these tests write reports of tables alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gs_dist.report import page_templates
from gs_dist.report.drawing import DrawingError


@pytest.fixture(scope="package", autouse=True)
def reports_without_drawings() -> Iterator[None]:
    """Hundreds of jobs run here, and drawing takes a process of its own and most of a second each time.

    The reports' own tests draw, and so do jobs that the tests of integration start.
    """

    def refuse(figures: object) -> dict[str, str]:
        raise DrawingError("these tests leave drawings out")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page_templates, "draw", refuse)
        yield
