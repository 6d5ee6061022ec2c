"""Which kinds of linears each version of an engine loads from ModelSlim's layout, as its own registry says.

vllm-ascend: the names that `quantization/methods/*.py` register for "linear" and "moe"; 0.18.0 and 0.23.0 as on PyPI,
main at 182b75e. sglang 0.5.23: `srt/layers/quantization/modelslim/modelslim.py`. xllm main at 87e8d6e:
`core/framework/hf_model_loader.cpp` and the loaders of `core/layers/npu/loader`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.errors import UserError
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["EngineKinds", "check_kinds", "kinds_of", "split_version"]

_DESCRIPTION = DIALECTS["ascend"].describing_file


@dataclass(frozen=True, kw_only=True)
class EngineKinds:
    """What a version of an engine loads.

    Attributes:
        engine: spelling in `gs-dist check --for`.
        version: a release, or main.
        linear: kinds of linears outside of experts.
        experts: kinds of experts of mixtures.
    """

    engine: str
    version: str
    linear: frozenset[str]
    experts: frozenset[str]

    @property
    def title(self) -> str:
        """`vllm-ascend 0.23.0`."""
        return f"{self.engine} {self.version}"

    def refusal(self, kind: str, *, expert: bool) -> str | None:
        """Why a linear of a kind is not loaded, and what is; None if it is."""
        served = self.experts if expert else self.linear
        if kind == "FLOAT" or kind in served:
            return None
        what = "experts of mixtures" if expert else "linears outside of experts"
        return f"{self.title} loads no {what} in {kind}: give them {', '.join(sorted(served))}, or null"


def _entry(engine: str, version: str, linear: Iterable[str], experts: Iterable[str]) -> EngineKinds:
    return EngineKinds(engine=engine, version=version, linear=frozenset(linear), experts=frozenset(experts))


_OLD_LINEAR = ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A8_DYNAMIC", "W4A4_DYNAMIC", "W8A8_MXFP8")
_OLD_EXPERTS = ("W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC", "W4A16", "W8A8_MXFP8")
_NEW_LINEAR = ("W4A4_MXFP4", "W4A8_MXFP", "W8A8FP8_DYNAMIC")
_NEW_EXPERTS = (*_NEW_LINEAR, "W4A16_MXFP4")

# Of each engine the oldest first; the last is what a name without version means.
_ENGINES: Mapping[str, tuple[EngineKinds, ...]] = MappingProxyType(
    {
        "vllm-ascend": (
            _entry("vllm-ascend", "0.18.0", _OLD_LINEAR, _OLD_EXPERTS),
            _entry("vllm-ascend", "0.23.0", (*_OLD_LINEAR, *_NEW_LINEAR), (*_OLD_EXPERTS, *_NEW_EXPERTS)),
            _entry(
                "vllm-ascend",
                "main",
                {*_OLD_LINEAR, *_NEW_LINEAR} - {"W4A8_DYNAMIC"},
                {*_OLD_EXPERTS, *_NEW_EXPERTS} - {"W8A8_MIX"},
            ),
        ),
        "sglang": (
            _entry(
                "sglang",
                "0.5.23",
                ("W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"),
                ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A4_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"),
            ),
        ),
        "xllm": (_entry("xllm", "main", ("W8A8", "W8A8_DYNAMIC"), ("W8A8_DYNAMIC", "W4A8_DYNAMIC")),),
    }
)


def split_version(text: str) -> tuple[str, str]:
    """`vllm-ascend==0.23` to the engine's name and the version, "" where there is none."""
    name, _, version = text.partition("==")
    return name.strip(), version.strip()


def kinds_of(text: str) -> EngineKinds | None:
    """What an engine loads from ModelSlim's layout, given `vllm-ascend`, `vllm-ascend==0.23` or `sglang`.

    Returns:
        None for an engine that has no list here.

    Raises:
        UserError: a version whose kinds are not known here.
    """
    name, version = split_version(text)
    versions = _ENGINES.get(name)
    if versions is None:
        return None
    if not version:
        return versions[-1]
    for entry in versions:
        if entry.version == version or entry.version.startswith(f"{version}."):
            return entry
    known = ", ".join(entry.version for entry in versions)
    raise UserError(f"--for {text}: known versions of {name} are {known}; name the one nearest to yours")


def check_kinds(inventory: Inventory, layout: Layout, kinds: EngineKinds) -> None:
    """Reports linears of an ascend directory that an engine does not load."""
    if layout.dialect != "ascend":
        found = f"{layout.dialect or 'unknown'} checkpoint"
        inventory.report("config.json", "engine-format", found, f"{_DESCRIPTION}, which {kinds.engine} reads")
        return
    for name, kind in layout.kinds.items():
        refusal = kinds.refusal(kind, expert=".experts." in name)
        if refusal is not None:
            inventory.report(_DESCRIPTION, "engine-kind", kind, refusal, name)
