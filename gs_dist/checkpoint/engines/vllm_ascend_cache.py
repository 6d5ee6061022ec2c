"""Which models' int8 KV caches a release of vLLM-Ascend loads, by the model types that its code names.

`patch_gqa_c8.py` of 0.23.0 patches the attention of Qwen3, GLM-4 MoE and MiniMax-M2, so that scales of their caches are
loaded. A mixture's is not relied on here: the directories that were tried are dense.
"""

from __future__ import annotations

__all__ = ["CACHE_LOADERS", "WITHOUT_CACHE_LOADER"]

CACHE_LOADERS = ("qwen3",)
"""Model types with a loader in every release."""

WITHOUT_CACHE_LOADER = ("0.18", "0.23")
"""Beginnings of releases that load no other model's."""
