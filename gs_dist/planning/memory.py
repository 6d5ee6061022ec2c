"""What a worker holds, byte by byte, computed from shapes before a weight is read.

Every constant stands at the top with its reason; each errs upwards. Measured peaks belong beside the
prediction in the summary, so that a constant that has drifted shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from gs_dist.methods.method import Work, is_large, objective_bytes
from gs_dist.model.decoder import DecoderArchitecture, LayerSpec
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.statistics import StatisticsSettings
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import DECODED_HELD, GIB

__all__ = [
    "ITEMS",
    "JobShape",
    "MemoryPlan",
    "StageShape",
    "SumCounts",
    "largest_gram_bytes",
    "layer_set_bytes",
    "probe_memory",
    "solver_bytes",
    "stage_memory",
]


ITEMS = ("runtime", "weights", "activations", "statistics", "solver workspace", "write buffers")

# Resident memory of a process once NumPy, SciPy, MindSpore and Ray are imported and the layer is compiled: 485 MiB
# for the libraries (mindspore 2.10, ray 2.60; 290 MiB of it file-backed), up to 615 MiB with a layer of no size.
# A static W8A8 job of a small model was seen 35 MiB above the sum of these and all other items: its heap keeps that.
CPU_RUNTIME_BYTES = GIB // 2 + GIB // 8 + GIB // 16
# On a card: context, streams and the memory pool's own blocks. Not measured here; vendors' guides put aside 1 to 2 GiB.
ASCEND_RUNTIME_BYTES = 2 * GIB

# Hidden states alive at once inside a layer: its input, the residual, the branch's output, and the two norms'.
HIDDEN_COPIES = 5
# Queries, keys and values before and after the rotary embedding, and the attention output before its projection.
QUERY_COPIES, KV_COPIES = 3, 3
# Scores of one block of queries at a time: raw, masked, exponents, sums spread over them, and the quotient.
SCORE_COPIES = 5
SCORE_BLOCK, SCORE_BLOCKS = 128, 8  # queries of a block: an eighth of the sequence, and no fewer than 128
# gate, its activation, up, and their product.
MLP_COPIES = 4
# An observer looks at float32 tokens beside one array of magnitudes; inputs are observed one after another.
OBSERVER_COPIES = 2

# On a card a block's Gram matrix is `sum + x xT`: the product and the new sum stand beside the old sum.
CARD_GRAM_WORKSPACES = 2

# While a model is evaluated logits exist for this many bytes of positions at a time, and 16 positions at least; raw,
# shifted, and their exponents.
LOGITS_BYTES, LOGITS_ROWS, LOGITS_COPIES = 64 << 20, 16, 3
# Where distributions are compared: logits of both models, their logarithms, exponents, difference and product.
COMPARED_COPIES = 7
# A layer being loaded: its tensors as read or decoded, and dequantised in float32, beside what is on the device.
LOADING_COPIES = 2

# Of a layer's largest weight while it is solved, in bytes per entry: in float32 the weight, and once more as rounded
# where a bias takes up its mean error (or another reader's weight, where all are searched together); int8 codes. What
# methods add is theirs to say (`gs_dist.methods`).
SOLVER_WEIGHT_BYTES = 2 * 4 + 1

# What each further thread of a solve holds. Always: 16 MiB of rows whose error is computed, clipped or rounded, up to
# twice; buffers of two BLAS libraries; and what its heap keeps.
THREAD_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted peak of one worker, bytes by item (`ITEMS`). On Ascend `items` is the card's, the rest the host's."""

    items: Mapping[str, int]
    host_items: Mapping[str, int] = field(default_factory=dict)
    solving: Mapping[str, int] = field(default_factory=dict)
    """Of the host (or of the CPU that is the device) while layers are solved, where a pass takes more."""

    @property
    def peak(self) -> int:
        """Bytes of the device at the worst moment: all items live."""
        return sum(self.items.values())

    @property
    def host_peak(self) -> int:
        """Bytes of host memory; the same as `peak` on the CPU."""
        return sum(self.host_items.values()) if self.host_items else self.peak

    def with_solver_bytes(self, more: int) -> MemoryPlan:
        """The same with that many more bytes of solver workspace."""
        shown = self.host_items or self.items
        held = dict(self.solving or shown)
        held["solver workspace"] += more
        if sum(held.values()) < sum(shown.values()):
            return replace(self, solving=held)
        return replace(self, solving={}, **{"host_items" if self.host_items else "items": held})

    def share_of(self, item: str) -> float:
        """An item's share of the peak, of the device or of its host, whichever is larger."""
        on_host = self.host_items.get(item, 0) / self.host_peak if self.host_items else 0.0
        return max(self.items.get(item, 0) / self.peak, on_host)

    @property
    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest item."""
        return max(self.items.items(), key=lambda item: item[1])

    @property
    def largest_of_host(self) -> tuple[str, int]:
        """Likewise, of host memory."""
        return max((self.host_items or self.items).items(), key=lambda item: item[1])


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """What memory depends on and stages share.

    Attributes:
        layer_weight_bytes: weights of each layer in the compute dtype.
        embedding_bytes: of the embedding table, as the checkpoint holds it.
        decoded_bytes: of the largest weight that is decoded when it is read, 0 for a checkpoint of floats.
        layer_output_bytes: what is written of each layer, at most.
        set_bytes: one set of statistics of each layer.
        solver_bytes: workspace of each layer's costliest linear: one thread solves them one after another.
        largest_gram_bytes: the largest Gram matrix taken of each layer.
    """

    architecture: DecoderArchitecture
    device: DeviceKind
    micro_batch_size: int
    sequence_length: int
    max_in_flight: int
    element_bytes: int
    layer_weight_bytes: Sequence[int]
    embedding_bytes: int
    decoded_bytes: int
    layer_output_bytes: Sequence[int]
    set_bytes: Sequence[int]
    solver_bytes: Sequence[int]
    largest_gram_bytes: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of one micro-batch, as they pass from stage to stage."""
        return self.tokens * self.architecture.hidden_size * self.element_bytes

    @cached_property
    def activation_bytes(self) -> int:
        """Working set of one layer on one micro-batch, and the micro-batches waiting."""
        a, tokens = self.architecture, self.tokens
        block = min(self.sequence_length, max(SCORE_BLOCK, -(-self.sequence_length // SCORE_BLOCKS)))
        entries = observed = 0
        for layer in a.kinds:
            attention = layer.attention
            scores = self.micro_batch_size * attention.num_heads * block * self.sequence_length
            held = tokens * (
                HIDDEN_COPIES * a.hidden_size
                + QUERY_COPIES * attention.query_size
                + KV_COPIES * attention.kv_size
                + MLP_COPIES * layer.mlp.channels_for_one
            )
            entries = max(entries, held + SCORE_COPIES * scores)
            widest = max(a.hidden_size, attention.query_size, attention.output_size, layer.mlp.widest)
            observed = max(observed, OBSERVER_COPIES * tokens * widest * 4)
        return entries * self.element_bytes + observed + self.max_in_flight * self.hidden_bytes


@dataclass(frozen=True, kw_only=True)
class SumCounts:
    """How many sets of statistics of an observed layer are alive at once.

    Attributes:
        observed: partial sums during a pass, the block being summed included.
        solved: of a layer that waits to be solved, once its pass is over.
        merged: of the layer being solved, beside those: what other replicas send, and the sum of all.
    """

    observed: int
    solved: int
    merged: int


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """One stage as a worker runs it: its layers, those observed in a wave, and what it keeps.

    `kept_micro_batches` counts the hidden states kept between waves (0 with a single wave).
    """

    layers: Sequence[int]
    wave: Sequence[int]
    resident: bool
    embeds: bool
    sums: SumCounts
    kept_micro_batches: int


NO_SUMS = SumCounts(observed=0, solved=0, merged=0)


def layer_set_bytes(layer: LayerSpec, settings: Mapping[str, StatisticsSettings]) -> int:
    """One set of statistics of one layer."""
    return sum(taken.nbytes(layer.channels[name]) for name, taken in settings.items())


def largest_gram_bytes(layer: LayerSpec, settings: Mapping[str, StatisticsSettings]) -> int:
    """Of one layer."""
    grams = {"gram", "weighted_gram", "blended_gram"}
    wide = (layer.channels[name] for name, taken in settings.items() if taken.fields(layer.channels[name]) & grams)
    return max((4 * channels**2 for channels in wide), default=0)


def solver_bytes(
    layer: LayerSpec,
    policies: Mapping[str, QuantPolicy | None],
    settings: Mapping[str, StatisticsSettings],
    num_threads: int = 1,
) -> int:
    """Workspace of a layer's solve: of its costliest linear, or with more threads, of its costliest input.

    As many small linears that read one input are solved at a time as there are threads, a large one alone. Each thread
    but the first brings the temporaries of what it works on.
    """
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in layer.linears}
    worst = further = 0
    for layer_input in layer.inputs:
        taken, shared, own, large = settings[layer_input.name], 0, [0], 0
        for name in layer_input.linears:
            policy, (rows, channels) = policies.get(name), shapes[name]
            if policy is None or not policy.quantizes_linear:
                continue
            work = Work(rows=rows, channels=channels, taken=taken, rescaled=policy.suppression.rescales)
            added = [method.workspace(policy, work) for method in policy.methods]
            sketched = objective_bytes(channels, taken) if taken.sketches(channels) else 0
            shared = max(shared, sketched + max(space.shared for space in added))
            needed = rows * channels * SOLVER_WEIGHT_BYTES + sum(space.own for space in added)
            if is_large(rows, channels):
                large = max(large, needed)
            else:
                own.append(needed)
            further = max(further, max(space.further(num_threads) for space in added))
        worst = max(worst, shared + max(large, sum(sorted(own)[-num_threads:])))
    return worst + (num_threads - 1) * THREAD_BYTES + further


def stage_memory(shape: JobShape, stage: StageShape) -> MemoryPlan:
    """Peak memory of a worker of this stage while it observes and solves `stage.wave`.

    A worker does one after the other, so its peak is that of the larger. What activations took is counted in both:
    MindSpore's pool keeps it.
    """
    weights = sum(shape.layer_weight_bytes[i] for i in (stage.layers if stage.resident else stage.wave))
    # What a view of a file would not take: the weights that a reader keeps, and the one that it decodes.
    read = (DECODED_HELD + 1) * shape.decoded_bytes + (shape.embedding_bytes if stage.embeds else 0)
    sets = [shape.set_bytes[i] for i in stage.wave]
    activations = shape.activation_bytes
    kept = stage.kept_micro_batches * shape.hidden_bytes
    solver = max((shape.solver_bytes[i] for i in stage.wave), default=0)
    written = max((shape.layer_output_bytes[i] for i in stage.wave), default=0)
    observing = (sum(sets) * stage.sums.observed, 0, 0)
    solving = (sum(sets) * stage.sums.solved + max(sets, default=0) * stage.sums.merged, solver, written)
    added = max(observing, solving, key=sum)
    if shape.device.on_host:
        # One address space: hidden states between waves, partial sums and solves all lie beside the weights.
        held = (CPU_RUNTIME_BYTES, weights + read, activations + kept)
        return MemoryPlan(items=_items(*held, *added), solving={} if added is solving else _items(*held, *solving))
    # The card sums the block at hand; finished blocks, hidden states between waves and solves are the host's, and so is
    # the embedding: rows of it are looked up there.
    card_statistics = sum(sets) + CARD_GRAM_WORKSPACES * max(
        (shape.largest_gram_bytes[i] for i in stage.wave), default=0
    )
    card = (ASCEND_RUNTIME_BYTES, weights, activations, card_statistics, 0, 0)
    in_flight = shape.max_in_flight * shape.hidden_bytes
    held = (CPU_RUNTIME_BYTES, read, kept + in_flight)
    return MemoryPlan(
        items=_items(*card),
        host_items=_items(*held, *added),
        solving={} if added is solving else _items(*held, *solving),
    )


def _items(*values: int) -> dict[str, int]:
    return dict(zip(ITEMS, values, strict=True))


def probe_memory(
    shape: JobShape,
    layers: Sequence[int],
    *,
    embeds: bool,
    last: bool,
    kept_micro_batches: int = 0,
    compares: bool = False,
) -> MemoryPlan:
    """Peak memory of a worker that holds `layers` of a model under evaluation, all of them at once.

    Args:
        shape: of the evaluation's micro-batches.
        layers: all of the stage's, or those that it holds at a time.
        embeds: whether it is the first stage.
        last: whether it is the last one, which holds the head (as large as the embedding) and makes logits.
        kept_micro_batches: hidden states kept until the next layers are loaded, 0 where all of the stage's are held.
        compares: whether the last stage compares distributions with the float model's, whose head may be another.
    """
    stage = StageShape(
        layers=layers, wave=(), resident=True, embeds=embeds, sums=NO_SUMS, kept_micro_batches=kept_micro_batches
    )
    held = stage_memory(shape, stage)
    rows = max(LOGITS_ROWS * 4 * shape.architecture.vocab_size, LOGITS_BYTES)
    copies = COMPARED_COPIES if compares else LOGITS_COPIES
    logits = copies * min(rows, shape.tokens * 4 * shape.architecture.vocab_size) if last else 0
    logits += shape.hidden_bytes if last and compares else 0
    loading = LOADING_COPIES * max(shape.layer_weight_bytes[i] for i in layers)
    head = shape.embedding_bytes * (2 if compares else 1) if last else 0
    items, host = dict(held.items), dict(held.host_items)
    items["weights"] += head
    items["activations"] += logits
    (host or items)["write buffers"] += loading
    return MemoryPlan(items=items, host_items=host)
