"""PTQConfig and its enumerations, as `mindspore_gs.ptq` has them.

Where Golden Stick's versions differ and its reference page is silent, the newer one (1.4.1) is followed:
group sizes 64, 128 and 256, `weight_clip`, and the stricter rules of W4A8.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

import mindspore as ms
from pydantic import ValidationError

from gs_dist.errors import UserError
from gs_dist.ptq.algorithm_config import AWQConfig, GPTQQuantConfig
from gs_dist.recipe.policy import (
    AlgoArgs,
    OutliersSuppressionType,
    PrecisionRecovery,
    QuantPolicy,
    contradictions,
)

__all__ = ["BackendTarget", "PTQConfig", "PTQMode", "QuantGranularity"]

logger = logging.getLogger(__name__)

# What Golden Stick refuses when a config is made; what no algorithm serves it refuses where the config is used.
_GRANULARITY = {
    "act_quant_granularity",
    "weight_quant_granularity",
    "kvcache_quant_granularity",
    "group_size",
}


class _Python:
    """Settings as users of this interface write them: members of enumerations by name."""

    def value(self, value: object) -> str:
        """`PER_TOKEN`, `None`, `int8`."""
        if isinstance(value, Enum):
            return value.name
        return value.upper() if isinstance(value, str) and not value.endswith(("int8", "int4x2")) else str(value)

    def setting(self, name: str, value: object) -> str:
        """`act_quant_granularity to PER_TOKEN`."""
        return f"{name} to {self.value(value)}"


_PYTHON = _Python()


class PTQMode(Enum):
    """What `PTQ.apply` does: find parameters from data, or build the structure for a checkpoint to load into."""

    QUANTIZE = "quantize"
    DEPLOY = "deploy"


class BackendTarget(Enum):
    """Where the quantised network will run (`mindspore_gs.common.BackendTarget`)."""

    NONE = "none"
    ASCEND = "ascend"


class QuantGranularity(str, Enum):
    """What shares one scale; `str(x)` is the value, as upstream."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_TOKEN = "per_token"
    PER_GROUP = "per_group"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def from_str(cls, name: str) -> QuantGranularity | None:
        """Member of that value, upper or lower case; None for any other text, as upstream."""
        return next((member for member in cls if member.value == name.lower()), None)


@dataclass(frozen=True)
class PTQConfig:
    """How a network, or the layers a pattern matches, are quantised (`mindspore_gs.ptq.PTQConfig`).

    Fields, their order and defaults are Golden Stick's; data types are MindSpore's `int8`, `qint4x2` or
    None. The last three, keyword-only, are this package's own. Unlike upstream a config cannot be
    assigned to after it was checked.

    Attributes:
        mode: QUANTIZE finds parameters from data, in PyNative mode; DEPLOY builds the structure only.
        backend: where the network will run.
        opname_blacklist: cells whose full name contains one of these stay as they are.
        algo_args: arguments of the algorithms, a dict or one of AWQConfig, GPTQQuantConfig and
            SmoothQuantConfig, kept as a dict.
        weight_quant_dtype: int8, qint4x2 or None.
        kvcache_quant_dtype: int8 or None.
        act_quant_dtype: int8 or None.
        precision_recovery: GPTQ or NONE.
        outliers_suppression: SMOOTH, AWQ, OUTLIER_SUPPRESSION_PLUS, OUTLIER_SUPPRESSION_LITE or NONE.
        weight_quant_granularity: PER_CHANNEL or PER_GROUP.
        kvcache_quant_granularity: PER_CHANNEL or PER_TOKEN.
        act_quant_granularity: PER_TENSOR or PER_TOKEN.
        group_size: 64, 128 or 256 with PER_GROUP weights, else 0.
        weight_clip: search how far weight ranges may be cut.
        weight_symmetric: weights without zero point.
        act_symmetric: static activations without zero point; upstream's have one.
        act_range: range of static activations, "minmax" as upstream or "mse" for that of least error.

    Raises:
        TypeError: `opname_blacklist` is no list or tuple of str; `outliers_suppression`,
            `precision_recovery`, `group_size` or `weight_clip` have another type.
        ValueError: `mode`, `backend`, a data type or a granularity that is not offered; per-token
            activations without int8 activations and quantised weights; W8A8 with weights not per channel;
            a per-token KV cache that is not int8; a `group_size` that does not go with the granularity;
            W4A8 without GPTQ, a GPTQQuantConfig with `desc_act` and `static_groups`, and per-token
            activations; `algo_args` that is neither dict nor dataclass.
    """

    mode: PTQMode = PTQMode.QUANTIZE
    backend: BackendTarget = BackendTarget.ASCEND
    opname_blacklist: list[str] | tuple[str, ...] = field(default_factory=list)
    algo_args: Any = field(default_factory=dict)
    weight_quant_dtype: Any = ms.int8
    kvcache_quant_dtype: Any = None
    act_quant_dtype: Any = None
    precision_recovery: PrecisionRecovery = PrecisionRecovery.NONE
    outliers_suppression: OutliersSuppressionType = OutliersSuppressionType.NONE
    weight_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    kvcache_quant_granularity: QuantGranularity = QuantGranularity.PER_CHANNEL
    act_quant_granularity: QuantGranularity = QuantGranularity.PER_TENSOR
    group_size: int = 0
    weight_clip: bool = False
    _: KW_ONLY
    weight_symmetric: bool = True
    act_symmetric: bool = False
    act_range: str = "minmax"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_granularity()
        self._check_precision_recovery()
        args = self.algo_args
        if is_dataclass(args) and not isinstance(args, type):
            args = asdict(args)
        elif not isinstance(args, dict):
            raise ValueError(f"algo_args must be a dict or a config such as AWQConfig, but got {args!r}")
        # Copies, so that what the caller does with his own objects later changes nothing here.
        object.__setattr__(self, "algo_args", dict(args))
        object.__setattr__(self, "opname_blacklist", type(self.opname_blacklist)(self.opname_blacklist))

    def _check_types(self) -> None:
        _require_member("mode", self.mode, PTQMode)
        _require_member("backend", self.backend, BackendTarget)
        _require_dtype("weight_quant_dtype", self.weight_quant_dtype, (ms.int8, ms.qint4x2))
        _require_dtype("kvcache_quant_dtype", self.kvcache_quant_dtype, (ms.int8,))
        _require_dtype("act_quant_dtype", self.act_quant_dtype, (ms.int8,))
        names: object = self.opname_blacklist
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"opname_blacklist must be a list of str, but got {names!r}")
        _require_type("outliers_suppression", self.outliers_suppression, OutliersSuppressionType)
        _require_type("group_size", self.group_size, int)
        for name in ("weight_clip", "weight_symmetric", "act_symmetric"):
            _require_type(name, getattr(self, name), bool)
        if self.act_range not in ("minmax", "mse"):
            raise ValueError(f"act_range must be 'minmax' or 'mse', but got {self.act_range!r}")

    def _check_granularity(self) -> None:
        act, weight = self.act_quant_granularity, self.weight_quant_granularity
        kvcache = self.kvcache_quant_granularity
        per = QuantGranularity
        _require_one_of("act_quant_granularity", act, (per.PER_TENSOR, per.PER_TOKEN))
        _require_one_of("weight_quant_granularity", weight, (per.PER_CHANNEL, per.PER_GROUP))
        _require_one_of("kvcache_quant_granularity", kvcache, (per.PER_CHANNEL, per.PER_TOKEN))
        if kvcache is per.PER_TOKEN and self.mode is PTQMode.QUANTIZE:
            logger.warning("kvcache_quant_granularity is PER_TOKEN: nothing is calibrated for the KV cache")
        for found in contradictions(QuantPolicy.model_construct(**self._settings())):
            if found.field in _GRANULARITY:
                raise ValueError(found.text(_PYTHON))

    def _check_precision_recovery(self) -> None:
        gptq = self.precision_recovery is PrecisionRecovery.GPTQ
        if gptq and self.algo_args == {}:
            logger.warning("precision_recovery is GPTQ without algo_args: the defaults of GPTQQuantConfig apply")
            object.__setattr__(self, "algo_args", GPTQQuantConfig())
        args = self.algo_args
        if isinstance(args, GPTQQuantConfig) and not gptq:
            logger.warning("algo_args is a GPTQQuantConfig, but precision_recovery is %s", self.precision_recovery)
        if self.weight_quant_dtype == ms.qint4x2 and self.act_quant_dtype is not None:
            if not gptq:
                raise ValueError("qint4x2 weights with int8 activations: set precision_recovery to GPTQ")
            if not isinstance(args, GPTQQuantConfig):
                raise ValueError("qint4x2 weights with int8 activations: algo_args must be a GPTQQuantConfig")
            if not (args.desc_act and args.static_groups):
                raise ValueError(
                    "qint4x2 weights with int8 activations: set desc_act and static_groups of GPTQQuantConfig to True"
                )
        _require_type("precision_recovery", self.precision_recovery, PrecisionRecovery)

    @property
    def policy(self) -> QuantPolicy:
        """The same settings as the solvers take them.

        Raises:
            UserError: settings that contradict each other, or `algo_args` with a key or value unknown to
                every algorithm (Golden Stick ignores such keys).
        """
        try:
            return QuantPolicy.model_validate({**self._settings(), "algo_args": _algo_args(self.algo_args)})
        except ValidationError as error:
            raise UserError("; ".join(_problem(detail) for detail in error.errors())) from None

    def _settings(self) -> dict[str, Any]:
        """As the solvers name them, without `algo_args`."""
        return {
            "weight_quant_dtype": _dtype_name(self.weight_quant_dtype),
            "act_quant_dtype": _dtype_name(self.act_quant_dtype),
            "kvcache_quant_dtype": _dtype_name(self.kvcache_quant_dtype),
            "weight_quant_granularity": self.weight_quant_granularity.value,
            "act_quant_granularity": self.act_quant_granularity.value,
            "kvcache_quant_granularity": self.kvcache_quant_granularity.value,
            "group_size": self.group_size,
            "weight_symmetric": self.weight_symmetric,
            "act_symmetric": self.act_symmetric,
            "outliers_suppression": self.outliers_suppression,
            "precision_recovery": self.precision_recovery,
            "weight_clip": self.weight_clip,
            "act_range": self.act_range,
        }


def config_from_fields(values: dict[str, Any]) -> PTQConfig:
    """PTQConfig from a dict of its fields.

    Raises:
        TypeError: a key that is no field; the message names the nearest one.
    """
    known = [f.name for f in fields(PTQConfig)]
    for key in values:
        if key not in known:
            raise TypeError(f"PTQConfig has no field {key!r}{_nearest(key, known)}")
    return PTQConfig(**values)


def check_schemes(config: PTQConfig, where: str) -> None:
    """Refuses combinations that no algorithm serves; `where` says in the message which config it is.

    Raises:
        ValueError: int8 activations without weights; W8A8 with AWQ or GPTQ; Outlier Suppression Lite on
            anything but W8A8; qint4x2 weights with an int8 KV cache.
    """
    policy = QuantPolicy.model_construct(**config._settings(), algo_args=_algo_args(config.algo_args))
    found = contradictions(policy)
    if found:
        raise ValueError(f"{where}: " + "; ".join(problem.text(_PYTHON) for problem in found))


def _require_member(name: str, value: object, kind: type[Enum]) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a member of {kind.__name__}, but got {value!r}")


def _require_one_of(name: str, value: object, members: tuple[QuantGranularity, ...]) -> None:
    # By identity: a plain str equals a member of a str enumeration.
    if not any(value is member for member in members):
        raise ValueError(f"{name} must be {' or '.join(member.name for member in members)}, but got {value!r}")


def _require_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, but got {value!r} ({type(value).__name__})")


def _require_dtype(name: str, value: object, dtypes: tuple[Any, ...]) -> None:
    if value is not None and not any(type(value) is type(dtype) and value == dtype for dtype in dtypes):
        offered = ", ".join("qint4x2" if dtype == ms.qint4x2 else "int8" for dtype in dtypes)
        raise ValueError(f"{name} must be {offered} of mindspore.dtype or None, but got {value!r}")


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    return "qint4x2" if dtype == ms.qint4x2 else "int8"


_NEVER = object()


def _algo_args(values: dict[str, Any]) -> AlgoArgs:
    known = list(AlgoArgs.model_fields)
    for key in values:
        if key not in known:
            raise UserError(f"algo_args: no algorithm knows {key!r}{_nearest(str(key), known)}")
    # AWQConfig holds Golden Stick's lists where nothing was asked for; what suits the algorithm stands for them.
    defaults = AWQConfig()
    asked = {key: value for key, value in values.items() if value != getattr(defaults, key, _NEVER)}
    return AlgoArgs(**asked)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _problem(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{path}: {message}" if path else message
