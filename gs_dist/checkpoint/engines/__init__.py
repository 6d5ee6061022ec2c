"""The rules of serving engines' loaders, one engine a file, each rule with the upstream file it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from gs_dist.checkpoint.engines import compressed_tensors, vllm_ascend, vllm_mindspore
from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout

__all__ = ["ENGINES"]

ENGINES: Mapping[str, Callable[[Inventory, Layout], None]] = MappingProxyType(
    {
        "transformers": compressed_tensors.check_transformers,
        "vllm": compressed_tensors.check_vllm,
        "vllm-ascend": vllm_ascend.check,
        "vllm-mindspore": vllm_mindspore.check,
    }
)
"""Name in `gs-dist check --for` to the rules of that engine's loader, which report problems to the inventory."""
