"""What a job does to each layer, from the recipe and the checkpoint's headers: policies, statistics, sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

from gs_dist.errors import CheckpointError, PlanError, UserError
from gs_dist.model.decoder import DecoderArchitecture, LayerSpec
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.kept_in_float import family_of, kept_reason
from gs_dist.model.statistics import StatisticsSettings
from gs_dist.numbers.groups import num_groups
from gs_dist.planning.bits import budget_bytes, schemes_of
from gs_dist.planning.memory import JobShape, largest_gram_bytes, layer_set_bytes, solver_bytes
from gs_dist.planning.solver_operations import solver_operations
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.matching import resolve_policies
from gs_dist.recipe.policy import QuantPolicy, required_statistics
from gs_dist.recipe.sections import CalibrationData
from gs_dist.wording import counted

__all__ = [
    "Operations",
    "TensorHeader",
    "Workload",
    "compute_bytes",
    "count_operations",
    "layer_settings",
    "make_workload",
    "runs_model",
    "without_gram",
]


class TensorHeader(Protocol):
    """What a checkpoint's header says of a tensor."""

    @property
    def dtype(self) -> str:
        """Element type, as the reader spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    @property
    def decoded(self) -> bool:
        """Whether what is read is made in memory, rather than a view of the file."""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating-point operations that the whole job needs, whatever it is run on.

    What symmetry and causality make superfluous is not counted: half of a Gram matrix, half of the
    attention scores. Multiplication and addition count as two.
    """

    forward: int
    statistics: int
    solve: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.statistics + self.solve


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Per layer: policies by name within the layer, what is observed, and sizes; `notes` is for people."""

    architecture: DecoderArchitecture
    resolved: Mapping[str, QuantPolicy | None]
    policies: tuple[Mapping[str, QuantPolicy | None], ...]
    settings: tuple[Mapping[str, StatisticsSettings], ...]
    layer_nbytes: tuple[int, ...]  # in the checkpoint
    layer_elements: tuple[int, ...]
    layer_output_nbytes: tuple[int, ...]
    embedding_nbytes: int
    outer_nbytes: int
    decoded_nbytes: int  # of the largest weight that is decoded when it is read
    notes: tuple[str, ...]
    schemes: Mapping[str, Mapping[str, QuantPolicy]]  # by name within the layer, where schemes are judged
    size_budget: int | None  # bytes of all linears, where they are chosen
    runs_model: bool  # on samples, to observe or to probe it; else layers are solved from statistics at hand

    def shape(self, data: CalibrationData, *, device: DeviceKind, max_in_flight: int) -> JobShape:
        """What memory depends on. The CPU has no bfloat16 product and computes in float32; a solve reads as stored."""
        computes = device.on_host and self.runs_model
        return JobShape(
            architecture=self.architecture,
            device=device,
            micro_batch_size=data.samples_per_micro_batch,
            sequence_length=data.sequence_length if self.runs_model else 0,
            max_in_flight=max_in_flight,
            element_bytes=compute_bytes(self.architecture, device),
            layer_weight_bytes=[4 * n for n in self.layer_elements] if computes else self.layer_nbytes,
            embedding_bytes=self.embedding_nbytes,
            decoded_bytes=self.decoded_nbytes,
            layer_output_bytes=self.layer_output_nbytes,
            set_bytes=self.set_bytes,
            solver_bytes=self._solver_bytes,
            largest_gram_bytes=self._largest_gram_bytes,
        )

    @cached_property
    def set_bytes(self) -> tuple[int, ...]:
        """One set of statistics, of each layer."""
        return tuple(_of_each(layer_set_bytes, self.architecture.layers, self.settings))

    @cached_property
    def _solver_bytes(self) -> tuple[int, ...]:
        return self.solver_bytes(1)

    def solver_bytes(self, num_threads: int) -> tuple[int, ...]:
        """Workspace of each layer's solve on that many threads."""
        parts = self.architecture.layers, self.policies, self.settings
        return tuple(_of_each(partial(solver_bytes, num_threads=num_threads), *parts))

    @cached_property
    def _largest_gram_bytes(self) -> tuple[int, ...]:
        return tuple(_of_each(largest_gram_bytes, self.architecture.layers, self.settings))

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of each layer; layers of one kind take the same memory."""
        sizes = (self.layer_elements, self.layer_nbytes, self.layer_output_nbytes, self.set_bytes)
        return tuple(zip(*sizes, self._solver_bytes, self._largest_gram_bytes, strict=True))


def _of_each(function: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """`function` of each row of the columns, once for rows of the same objects: alike layers are many."""
    found: dict[tuple[int, ...], T] = {}
    rows = list(zip(*columns, strict=True))
    for row in rows:
        key = tuple(map(id, row))
        if key not in found:
            found[key] = function(*row)
    return [found[tuple(map(id, row))] for row in rows]


def compute_bytes(architecture: DecoderArchitecture, device: DeviceKind) -> int:
    """Bytes of an element of hidden states."""
    return device.compute_bytes(architecture.dtype)


def layer_settings(
    layer: LayerSpec,
    policies: Mapping[str, QuantPolicy | None],
    *,
    gram: bool,
    sketch_rows: int,
    everything: bool = False,
    judged: bool = False,
) -> dict[str, StatisticsSettings]:
    """What is observed of a layer; keys and values only where their cache gets one scale per channel.

    With `everything`, all that any recipe could need, for statistics that are kept; the matrix that GPTQ solves with
    only where this recipe does, or takes matrices anyway. With `judged`, second moments of linears that stay in float,
    too.
    """
    settings = required_statistics(layer.inputs, policies, gram=gram, sketch_rows=sketch_rows)
    if everything:
        kept = {
            name: replace(
                taken,
                gram=True,
                weighted_gram=True,
                histogram=True,
                sample=True,
                blended_gram=taken.blended_gram or not sketch_rows,
            )
            for name, taken in settings.items()
        }
        return kept | dict.fromkeys(layer.attention.cached, StatisticsSettings(gram=False))
    if judged:
        settings = {name: replace(taken, gram=True) for name, taken in settings.items()}
    for name, linear in layer.attention.cached.items():
        policy = policies.get(linear)
        if policy and policy.kvcache_quant_dtype and policy.kvcache_quant_granularity == "per_channel":
            settings[name] = StatisticsSettings(gram=False)
    return settings


def _resolve(
    config: CalibrationConfig, architecture: DecoderArchitecture
) -> tuple[dict[str, QuantPolicy | None], tuple[str, ...]]:
    """Policies of all linears; the head is carried over as it is."""
    resolved = resolve_policies(
        architecture.linear_names(), config.network_policy, config.resolved_layer_policies, config.ptq.opname_blacklist
    )
    named = [pattern for pattern, override in config.layer_policies.items() if "lm_head" in pattern and override]
    if named:
        raise PlanError(
            f"layer_policies.'{named[0]}' asks for a quantised lm_head, which is always carried over as it is: "
            "set the entry to null or remove it"
        )
    notes: tuple[str, ...] = ()
    if resolved["lm_head"] is not None:
        notes = ("lm_head is carried over as it is; add it to ptq.opname_blacklist to say so in the recipe",)
        resolved["lm_head"] = None
    kept = [name for name in _staying(architecture) if resolved[name] is not None]
    resolved |= dict.fromkeys(kept)
    notes = (*notes, *_kept_notes(kept))
    if not any(p and (p.quantizes_linear or p.kvcache_quant_dtype) for p in resolved.values()):
        raise UserError(
            "the policies leave every linear of the decoder layers unquantised: change ptq or layer_policies"
        )
    return resolved, notes


def _kept_notes(names: Sequence[str]) -> Iterator[str]:
    """Why linears that the recipe would quantise stay in float."""
    for leaf, number in sorted(Counter(name.rpartition(".")[2] for name in names).items()):
        reason = kept_reason(leaf, family_of(""))
        yield f"{counted(number, 'linear')} {leaf} ({reason}) stay in float, and follow what rescales their inputs"


def _staying(architecture: DecoderArchitecture) -> list[str]:
    """Full names of the linears that are never quantised."""
    own = {kind: [linear.name for linear in kind.linears if linear.stays] for kind in architecture.kinds}
    return [architecture.layer_prefix(i) + name for i, kind in enumerate(architecture.layers) for name in own[kind]]


def _check_groups(architecture: DecoderArchitecture, resolved: Mapping[str, QuantPolicy | None]) -> None:
    for layer in range(architecture.num_layers):
        for linear in architecture.linears(layer):
            name = architecture.layer_prefix(layer) + linear.name
            policy = resolved[name]
            if policy is None or not policy.quantizes_linear:
                continue
            try:
                num_groups(linear.in_features, policy.group_size, policy.weight_format.group_sizes)
            except UserError as error:
                raise PlanError(f"{name}: {error}, for it under layer_policies or in ptq") from None


def _check_shared(architecture: DecoderArchitecture, layer: int, policies: Mapping[str, QuantPolicy | None]) -> None:
    """Refuses policies that differ where linears share what is changed: a rescaled input, or the KV cache."""
    prefix = architecture.layer_prefix(layer)
    cached = architecture.layers[layer].attention.cached
    if not cached and any(map(_cache_of, policies.values())):
        raise PlanError(
            f"{prefix}self_attn makes keys and values in one linear, of one latent for all heads (multi-head latent "
            "attention) or of what queries read (qkv_proj), and no engine keeps these in int8 by scales of k_proj and "
            "v_proj: set kvcache_quant_dtype: null"
        )
    if len({_cache_of(policies[name]) for name in cached.values()}) > 1:
        written = " and ".join(cached.values()).replace("and self_attn.", "and ")
        raise PlanError(
            f"{prefix}{written} differ in kvcache_quant_dtype or kvcache_quant_granularity, "
            "and keys and values share one cache: give both the same in layer_policies and opname_blacklist"
        )
    no_cache = {"kvcache_quant_dtype": None, "kvcache_quant_granularity": "per_channel"}
    for layer_input in architecture.inputs(layer):
        readers = [policies[name] for name in layer_input.linears]
        asked = [p for p in readers if p and p.suppression.rescales]
        if asked and len({None if p is None else p.model_copy(update=no_cache) for p in readers}) > 1:
            raise PlanError(
                f"{prefix}{', '.join(layer_input.linears)} read one activation, which "
                f"{asked[0].outliers_suppression.value} rescales for all of them, and their policies differ: give them "
                "the same in layer_policies and opname_blacklist, or set outliers_suppression: none for all of them"
            )


def _cache_of(policy: QuantPolicy | None) -> tuple[str, str] | None:
    if policy is None or policy.kvcache_quant_dtype is None:
        return None
    return policy.kvcache_quant_dtype, policy.kvcache_quant_granularity


def _output_nbytes(
    architecture: DecoderArchitecture, layer: int, policies: Mapping[str, QuantPolicy | None], nbytes: int
) -> int:
    """Bytes of a layer's shard at most: every quantised weight at one byte and more, the rest as in the checkpoint."""
    weights = {linear.name: linear.out_features * linear.in_features for linear in architecture.linears(layer)}
    total_entries = sum(weights.values())
    source_bytes = max(1, nbytes // max(1, total_entries))
    total = nbytes
    for name, entries in weights.items():
        policy = policies.get(name)
        if policy and policy.quantizes_linear:
            scales = entries // policy.group_size * 8 if policy.group_size else 0
            total += entries * policy.weight_format.bits // 8 + scales - entries * source_bytes
    return max(total, 0)


def _check_length(config: CalibrationConfig, architecture: DecoderArchitecture) -> None:
    length, positions = config.calibration.sequence_length, architecture.max_position_embeddings
    if length > positions:
        raise PlanError(
            f"calibration.sequence_length is {length}, and config.json gives the model {positions} positions "
            f"(max_position_embeddings), beyond which its activations mean nothing: set it to {positions} or less"
        )


def runs_model(config: CalibrationConfig, *, statistics_at_hand: bool) -> bool:
    """Whether a job runs the model: to observe it, or to probe what it published."""
    return not statistics_at_hand or config.max_perplexity_increase is not None


def make_workload(
    config: CalibrationConfig,
    architecture: DecoderArchitecture,
    tensors: Mapping[str, TensorHeader],
    *,
    statistics_at_hand: bool = False,
) -> Workload:
    """Lays the recipe over the checkpoint.

    Args:
        config: the recipe.
        architecture: of the checkpoint.
        tensors: header of every tensor of the checkpoint, by full name.
        statistics_at_hand: whether an earlier job has observed the model, which then runs for a probe alone.

    Raises:
        CheckpointError: a tensor of the architecture has no header.
        PolicyConflictError, UserError, PlanError: policies that conflict, match nothing or do not suit a shape.
    """
    _check_length(config, architecture)
    resolved, notes = _resolve(config, architecture)
    _check_groups(architecture, resolved)
    policies: list[Mapping[str, QuantPolicy | None]] = []
    shared: dict[tuple[int, ...], Mapping[str, QuantPolicy | None]] = {}
    layer_headers = []
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        own = {linear.name: resolved[prefix + linear.name] for linear in architecture.linears(layer)}
        key = (id(architecture.layers[layer]), *map(id, own.values()))
        if key not in shared:
            _check_shared(architecture, layer, own)
        policies.append(shared.setdefault(key, own))
        layer_headers.append(_headers(tensors, [prefix + name for name in architecture.layer_tensors(layer)]))
    schemes: dict[str, Mapping[str, QuantPolicy]] = {}
    if config.judges_schemes:
        schemes = {
            linear.name: schemes_of(config.network_policy, linear.in_features)
            for layer_kind in architecture.kinds
            for linear in layer_kind.linears
        }
    size_budget = None
    if config.bits == "auto":
        if any(kind.mlp.experts for kind in architecture.kinds):
            raise PlanError(
                "bits: auto chooses linear by linear, and engines run all experts of a layer as one scheme: set bits: "
                "fixed, and give the experts a policy under layer_policies"
            )
        assert config.size_budget is not None
        fixed = {name for name, policy in resolved.items() if policy is None}
        size_budget = budget_bytes(config.size_budget, architecture, schemes, fixed)
    nbytes = tuple(sum(header.nbytes for header in headers) for headers in layer_headers)
    embedding = _headers(tensors, ["model.embed_tokens.weight"])[0]
    outer = [*architecture.outer_tensors(), *(name for name, _ in architecture.carried)]
    return Workload(
        architecture=architecture,
        resolved=resolved,
        policies=tuple(policies),
        settings=tuple(
            _of_each(
                partial(
                    layer_settings,
                    gram=config.takes_gram,
                    sketch_rows=config.taken_sketch_rows,
                    everything=config.keep_statistics,
                    judged=config.judges_schemes,
                ),
                architecture.layers,
                policies,
            )
        ),
        layer_nbytes=nbytes,
        layer_elements=tuple(sum(math.prod(h.shape) for h in headers) for headers in layer_headers),
        layer_output_nbytes=tuple(
            # Which linears stay in float is not known before they are judged, or solved.
            nbytes[layer]
            if config.bits == "auto" or config.on_bad_layer == "keep_float"
            else _output_nbytes(architecture, layer, policies[layer], nbytes[layer])
            for layer in range(architecture.num_layers)
        ),
        embedding_nbytes=embedding.nbytes,
        decoded_nbytes=max((header.nbytes for header in tensors.values() if header.decoded), default=0),
        outer_nbytes=sum(header.nbytes for header in _headers(tensors, outer)),
        notes=notes,
        schemes=schemes,
        size_budget=size_budget,
        runs_model=runs_model(config, statistics_at_hand=statistics_at_hand),
    )


def without_gram(workload: Workload) -> Workload:
    """The same job with `gram: off`: only what solvers themselves need is observed."""
    settings = tuple(
        {
            name: replace(taken, gram=taken.gram and (taken.weighted_gram or taken.blended_gram))
            for name, taken in layer.items()
        }
        for layer in workload.settings
    )
    return replace(workload, settings=settings)


def _headers(tensors: Mapping[str, TensorHeader], names: Sequence[str]) -> list[TensorHeader]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no tensor {missing[0]}, which its config.json implies ({len(missing)} missing): "
            "complete the download, or correct config.json"
        )
    return [tensors[name] for name in names]


def count_operations(workload: Workload, data: CalibrationData, *, device: DeviceKind) -> Operations:
    """Operations of forward passes, statistics and solves over the whole job."""
    sequence_length = data.sequence_length
    tokens = data.num_samples * sequence_length if workload.runs_model else 0

    def of_layer(
        layer: LayerSpec, policies: Mapping[str, QuantPolicy | None], settings: Mapping[str, StatisticsSettings]
    ) -> tuple[int, int, int]:
        attention = sum(linear.out_features * linear.in_features for linear in layer.attention.linears)
        forward = 2 * (attention + layer.mlp.active_entries)
        # Scores and their product with values, half of them masked.
        forward += (sequence_length + 1) * (layer.attention.query_size + layer.attention.output_size)
        observed = 0
        for name, taken in settings.items():
            seen = round(tokens * layer.share_of_tokens(name))
            observed += seen * taken.operations(layer.channels[name], dense=not device.on_host)
        return forward, observed, solver_operations(layer, policies, settings, workload.schemes)

    counted = _of_each(of_layer, workload.architecture.layers, workload.policies, workload.settings)
    forward, observed, solve = (sum(column) for column in zip(*counted, strict=True))
    return Operations(forward=tokens * forward, statistics=observed, solve=solve)
