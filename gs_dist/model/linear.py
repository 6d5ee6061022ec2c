"""A linear as data, and an activation that linears read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerInput", "Linear"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of a decoder layer: `name` within the layer, weight (out_features, in_features).

    One that `stays` is never quantised: a router's, or another whose few outputs decide more than they cost.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    stays: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape."""
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes[f"{self.name}.bias"] = (self.out_features,)
        return shapes


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """An activation that linears read, where statistics are taken.

    `linears` share it. `source` is what a per-channel rescaling folds into: a norm's name, or the linear
    whose rows are divided (`self_attn.v_proj` for the attention output, `mlp.up_proj` for the mlp
    activation), or None where nothing can absorb it. `repeat` is how many channel groups of `channels`
    share one row group of the source: the query heads of a KV head (grouped-query attention), else 1.
    `followers` read it too and stay as they are in number format, but follow every rescaling: a router.
    `routed` are those of which each token reaches a few only, as a router decides.
    """

    name: str
    channels: int
    linears: tuple[str, ...]
    source: str | None
    repeat: int = 1
    head_dim: int = 0  # channels of one head where repeat > 1
    followers: tuple[str, ...] = ()
    routed: bool = False
