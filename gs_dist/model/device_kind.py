"""What workers compute on."""

from __future__ import annotations

from enum import Enum

__all__ = ["DeviceKind"]


class DeviceKind(str, Enum):
    """A kind of device, and what follows from it for plans.

    `auto` is no kind: it is resolved before there is a plan.
    """

    CPU = "cpu"
    ASCEND = "ascend"

    def __str__(self) -> str:
        """As recipes write it."""
        return self.value

    @property
    def on_host(self) -> bool:
        """Whether workers compute in the host's memory, where everything lies in one address space."""
        return self is DeviceKind.CPU

    @property
    def npus(self) -> int:
        """Cards of a worker."""
        return 0 if self.on_host else 1

    def compute_bytes(self, checkpoint_dtype: str) -> int:
        """Bytes of a weight's or hidden state's element: the host has no product of half precision."""
        return 4 if self.on_host or checkpoint_dtype == "float32" else 2
