"""`mindspore_gs.common`: the target of a network, and the log of the scripts."""

from __future__ import annotations

import logging

from gs_dist.ptq.config import BackendTarget

__all__ = ["BackendTarget", "logger"]


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Golden Stick's logger: `set_level`, and `flush` as `print` has it."""

    def set_level(self, level: int | str) -> None:
        """As `logging.Logger.setLevel`."""
        self.logger.setLevel(level)

    def log(self, level: int, msg: object, *args: object, flush: bool = False, **kwargs: object) -> None:  # type: ignore[override]  # `flush` is its own
        """As `logging.Logger.log`; a record is written at once in any case."""
        super().log(level, msg, *args, **kwargs)  # type: ignore[arg-type]  # passed on as they came


logger = _Logger(logging.getLogger("gs_dist.golden_stick"), {})
