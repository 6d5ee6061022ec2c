"""Integers of six bits."""

from __future__ import annotations

from gs_dist.numbers.integer import Integer

__all__ = ["INT6"]

INT6 = Integer(name="int6", title="int6", label="W6", bits=6, group_sizes=(0, 64))
