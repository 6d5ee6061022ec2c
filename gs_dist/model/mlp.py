"""Kinds of mlp as data: linears, what they read, and tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from gs_dist.model.linear import LayerInput, Linear

__all__ = ["SHARED", "GatedMlp", "MixtureOfExperts", "Mlp", "Routing", "expert_input"]


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x)); where `fused`, one linear makes gate and up, in this order."""

    kind: ClassVar[str] = "gated"

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    fused: bool = False

    @property
    def widest(self) -> int:
        """Channels of its widest activation."""
        return self.intermediate_size * (2 if self.fused else 1)

    @property
    def channels_for_one(self) -> int:
        """Numbers made for a token, in all activations of one width or another."""
        return self.intermediate_size

    @property
    def active_entries(self) -> int:
        """Entries of the matrices that one token passes."""
        return sum(linear.out_features * linear.in_features for linear in self.linears)

    @property
    def share_of_tokens(self) -> float:
        """Share of the tokens that reach an expert."""
        return 1.0

    @property
    def experts(self) -> tuple[tuple[Linear, ...], ...]:
        """Linears of each expert."""
        return ()

    @property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape of tensors that are no linear's."""
        return {}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Gate, up and down, in checkpoint order."""
        h, m = self.hidden_size, self.intermediate_size
        made = (("gate_up_proj", 2 * m, h),) if self.fused else (("gate_proj", m, h), ("up_proj", m, h))
        rows = (*made, ("down_proj", h, m))
        return tuple(
            Linear(name=f"mlp.{name}", out_features=out, in_features=channels, bias=self.bias)
            for name, out, channels in rows
        )

    def inputs(self, source: str | None) -> tuple[LayerInput, ...]:
        """What its linears read, where `source` is the norm before it; rows of a fused linear take up no rescaling."""
        *first, last = (linear.name for linear in self.linears)
        return (
            LayerInput(name="mlp_input", channels=self.hidden_size, linears=tuple(first), source=source),
            LayerInput(
                name="mlp_activation",
                channels=self.intermediate_size,
                linears=(last,),
                source=None if self.fused else "mlp.up_proj",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token chooses experts by the scores that the router gives them, in float32.

    Scores are the `scoring` ("softmax" or "sigmoid") of the router's logits, which are computed in float32 themselves
    where `wide`. The `top_k` best are chosen; with `num_groups` above 1 only among the experts of the `top_groups`
    best groups, where a group counts as much as its best expert or, with `pairs`, its two best. `correction` names a
    tensor that is added to the scores for choosing alone. The scores of the chosen, brought to a sum of 1 where
    `normalized`, times `scale`, weight their outputs.
    """

    top_k: int
    scoring: str = "softmax"
    normalized: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    pairs: bool = False
    wide: bool = False
    correction: str | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Gated mlps of which each token passes the few that a router chooses, and maybe one that all pass.

    `prefix` and `names` (gate, up, down) spell the tensors: `mlp.experts.3.gate_proj`. The shared expert is a gated
    mlp of `shared_size` channels (0: none) named `shared`, whose output is weighted by the sigmoid of the linear
    `shared_gate` where there is one.

    All experts, the shared one and the routers read one norm, so one rescaling serves them all, and `mlp_input` holds
    all tokens: what gates and ups are rounded against. What a `down` reads is its expert's own, `expert.3`.
    """

    kind: ClassVar[str] = "experts"

    hidden_size: int
    num_experts: int
    intermediate_size: int
    routing: Routing
    prefix: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert"
    shared_size: int = 0
    shared_gate: str | None = None

    @property
    def widest(self) -> int:
        """Channels of its widest activation."""
        return max(self.intermediate_size, self.shared_size)

    @property
    def channels_for_one(self) -> int:
        """Numbers made for a token, in all activations of one width or another."""
        top_k = self.routing.top_k
        return top_k * (self.intermediate_size + self.hidden_size) + 2 * self.num_experts + self.shared_size

    @property
    def active_entries(self) -> int:
        """Entries of the matrices that one token passes."""
        passed = (*self.expert(0) * self.routing.top_k, *self.outer_linears, *self.shared_linears)
        return sum(linear.out_features * linear.in_features for linear in passed)

    @property
    def share_of_tokens(self) -> float:
        """Share of the tokens that reach an expert, where the router deals them out evenly."""
        return self.routing.top_k / self.num_experts

    @cached_property
    def experts(self) -> tuple[tuple[Linear, ...], ...]:
        """Linears of each expert."""
        return tuple(self.expert(number) for number in range(self.num_experts))

    @property
    def fused_places(self) -> tuple[str, ...]:
        """Where within the layer a tensor may hold all experts: in the block, or as transformers 5 calls it."""
        return tuple(dict.fromkeys((f"{self.prefix}.experts", "mlp.experts")))

    @property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape of tensors that are no linear's."""
        correction = self.routing.correction
        return {} if correction is None else {correction: (self.num_experts,)}

    def _gated(self, prefix: str, size: int, names: tuple[str, str, str]) -> tuple[Linear, ...]:
        h = self.hidden_size
        rows = ((names[0], size, h), (names[1], size, h), (names[2], h, size))
        return tuple(
            Linear(name=f"{prefix}.{name}", out_features=out, in_features=channels, bias=False)
            for name, out, channels in rows
        )

    @property
    def router(self) -> Linear:
        """Makes the logits of all experts."""
        return Linear(
            name=f"{self.prefix}.gate",
            out_features=self.num_experts,
            in_features=self.hidden_size,
            bias=False,
            stays=True,
        )

    @property
    def outer_linears(self) -> tuple[Linear, ...]:
        """The router, and the shared expert's gate where there is one."""
        if self.shared_gate is None:
            return (self.router,)
        gate = Linear(name=self.shared_gate, out_features=1, in_features=self.hidden_size, bias=False, stays=True)
        return (self.router, gate)

    def expert(self, number: int) -> tuple[Linear, ...]:
        """Gate, up and down of an expert."""
        return self._gated(f"{self.prefix}.experts.{number}", self.intermediate_size, self.names)

    @property
    def shared_linears(self) -> tuple[Linear, ...]:
        """Gate, up and down of the shared expert, where there is one."""
        if not self.shared_size:
            return ()
        return self._gated(self.shared, self.shared_size, ("gate_proj", "up_proj", "down_proj"))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Routers, experts one by one, the shared one."""
        experts = (linear for number in range(self.num_experts) for linear in self.expert(number))
        return (*self.outer_linears, *experts, *self.shared_linears)

    def inputs(self, source: str | None) -> tuple[LayerInput, ...]:
        """What its linears read, where `source` is the norm before it."""
        groups = [self.expert(number) for number in range(self.num_experts)]
        shared = [self.shared_linears] if self.shared_size else []
        read = LayerInput(
            name="mlp_input",
            channels=self.hidden_size,
            linears=tuple(linear.name for group in (*groups, *shared) for linear in group[:2]),
            source=source,
            followers=tuple(linear.name for linear in self.outer_linears),
        )
        names = [*map(expert_input, range(self.num_experts)), *([SHARED] if shared else [])]
        own = [
            LayerInput(
                name=name,
                channels=group[2].in_features,
                linears=(group[2].name,),
                source=group[1].name,
                routed=name != SHARED,
            )
            for name, group in zip(names, (*groups, *shared), strict=True)
        ]
        return (read, *own)


SHARED = "shared_activation"
"""Name of the input of the shared expert's last linear."""


def expert_input(number: int) -> str:
    """Name of the input of an expert's last linear."""
    return f"expert.{number}"


Mlp = GatedMlp | MixtureOfExperts
