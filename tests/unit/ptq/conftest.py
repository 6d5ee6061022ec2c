from __future__ import annotations

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def cpu(request: pytest.FixtureRequest) -> None:
    """Chooses the CPU before MindSpore runs anything, as every part of the package that opens a device does."""
    if request.node.get_closest_marker("npu") is None:
        ms.set_device("CPU")
