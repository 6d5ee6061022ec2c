"""What each scheme that a linear's weight may be stored as was found to cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FLOAT", "W4", "W8", "LayerCosts", "SchemeCost"]

FLOAT, W8, W4 = "float", "W8", "W4"


@dataclass(frozen=True, kw_only=True)
class SchemeCost:
    """What one scheme does to one linear.

    Attributes:
        name: full dotted name of the linear.
        group: names the linears that read one input; serving engines fuse them, so they share a scheme.
        scheme: key of the scheme, `FLOAT` for leaving the linear as it is.
        num_bytes: what the linear takes on storage, scales included.
        error: tr(D G DT), the squared output error over all tokens.
        relative_error: that as a share of the squared output.
        token_error: |z - y|^2 / |y|^2 of the median token of a sample; None where none was taken.
    """

    name: str
    group: str
    scheme: str
    num_bytes: int
    error: float
    relative_error: float
    token_error: float | None = None

    @property
    def largest_error(self) -> float:
        """The larger of what all tokens and what the median token say: a few tokens may own the sum over all."""
        return max(self.relative_error, self.token_error or 0.0)


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of every scheme for each linear of a decoder layer, in the layer's order."""

    layer: int
    costs: tuple[SchemeCost, ...]
