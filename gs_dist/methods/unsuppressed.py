"""Inputs as they are."""

from __future__ import annotations

from gs_dist.methods.method import Arguments, SuppressionMethod

__all__ = ["Unsuppressed"]


class Unsuppressed(SuppressionMethod[Arguments]):
    """Changes nothing."""

    name = "none"
    rescales = False
