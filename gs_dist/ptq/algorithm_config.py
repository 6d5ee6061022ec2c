"""Arguments of the single algorithms, under the names and with the checks of Golden Stick."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["AWQConfig", "GPTQQuantConfig", "SmoothQuantConfig"]


def _require(owner: str, name: str, value: object, kinds: tuple[type, ...]) -> None:
    # bool is an int to Python; where an int is asked for, True is still a slip.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{owner}: {name} must be {wanted}, but got {value!r} ({type(value).__name__})")


def _require_ratios(owner: str, name: str, value: object) -> None:
    _require(owner, name, value, (float, list))
    entries: Iterable[object] = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not value:
        raise ValueError(f"{owner}: {name} is an empty list: nothing to search; give values between 0 and 1")
    for entry in entries:
        if not isinstance(entry, float | int) or isinstance(entry, bool):
            raise TypeError(f"{owner}: {name} must hold floats, but got {entry!r}")
        if not 0 <= entry <= 1:
            raise ValueError(f"{owner}: {name} must lie between 0 and 1, but got {entry!r}")


@dataclass
class AWQConfig:
    """Arguments of activation-aware weight quantisation (`mindspore_gs.ptq.AWQConfig`).

    A list is searched for the value of least error, a float is used as it is. An empty list is refused
    here; Golden Stick accepts it and fails later.

    Attributes:
        duo_scaling: whether the scale takes the weights into account besides the activations.
        smooth_alpha: exponents of the scale, in [0, 1].
        weight_clip_ratio: parts of a weight range to keep, in [0, 1].

    Raises:
        TypeError: `duo_scaling` is not a bool, or another argument neither float nor list.
        ValueError: a value outside [0, 1], or an empty list.
    """

    duo_scaling: bool = True
    smooth_alpha: list[float] | float = field(default_factory=lambda: [i / 20 for i in range(20)])
    weight_clip_ratio: list[float] | float = field(default_factory=lambda: [1 - i / 20 for i in range(10)])

    def __post_init__(self) -> None:
        _require("AWQConfig", "duo_scaling", self.duo_scaling, (bool,))
        _require_ratios("AWQConfig", "smooth_alpha", self.smooth_alpha)
        _require_ratios("AWQConfig", "weight_clip_ratio", self.weight_clip_ratio)


@dataclass
class GPTQQuantConfig:
    """Arguments of GPTQ (`mindspore_gs.ptq.GPTQQuantConfig`).

    A `block_size` of 0 is refused here; Golden Stick accepts it and fails later.

    Attributes:
        block_size: columns whose errors are spread together.
        desc_act: take columns in order of falling activation energy.
        damp_percent: part of the Hessian's mean diagonal added to it, in [0, 1].
        static_groups: find the scales of groups before any column is changed.

    Raises:
        TypeError: `block_size` is not an int, `desc_act` or `static_groups` not a bool, or
            `damp_percent` not a float.
        ValueError: `block_size` below 1, or `damp_percent` outside [0, 1].
    """

    block_size: int = 128
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False

    def __post_init__(self) -> None:
        _require("GPTQQuantConfig", "block_size", self.block_size, (int,))
        _require("GPTQQuantConfig", "desc_act", self.desc_act, (bool,))
        _require("GPTQQuantConfig", "damp_percent", self.damp_percent, (float,))
        _require("GPTQQuantConfig", "static_groups", self.static_groups, (bool,))
        if self.block_size < 1:
            raise ValueError(f"GPTQQuantConfig: block_size must be at least 1, but got {self.block_size}")
        if not 0 <= self.damp_percent <= 1:
            raise ValueError(f"GPTQQuantConfig: damp_percent must lie between 0 and 1, but got {self.damp_percent}")


@dataclass
class SmoothQuantConfig:
    """Argument of SmoothQuant (`mindspore_gs.ptq.ptq_config.SmoothQuantConfig`).

    Attributes:
        alpha: how much of the activations' range moves into the weights, in [0, 1].

    Raises:
        TypeError: `alpha` is not a float.
        ValueError: `alpha` outside [0, 1].
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _require("SmoothQuantConfig", "alpha", self.alpha, (float,))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuantConfig: alpha must lie between 0 and 1, but got {self.alpha}")
