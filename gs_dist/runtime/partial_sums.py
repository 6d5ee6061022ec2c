"""What a replica hands to a layer's owner: its partial sums, and by what the owner can tell that they belong there.

Checksums guard against accidents, such as another copy of the model, other samples, or a damaged transfer.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gs_dist.checkpoint.lineage import checksum_of
from gs_dist.errors import CheckpointError, LayerError
from gs_dist.model.statistics import TreeNode
from gs_dist.seal import joined

__all__ = ["PartialSums", "check_partial_sums"]


@dataclass(frozen=True, kw_only=True)
class PartialSums:
    """A replica's statistics of one layer.

    Attributes:
        layer: the layer.
        replica: who observed it.
        start, stop: micro-batches that were run, the last one excluded.
        weights: number of each layer that the pass ran in its source form, up to this one, to the
            checksum of its tensors as this replica read them.
        behind: checksum of what the first of them is behind of (see `Lineage`).
        samples: digest of every sample that was fed, in order.
        nodes: the sums.
        checksum: of all the above as the replica had it; empty until `sealed`.
        node: name of the machine.
    """

    layer: int
    replica: int
    start: int
    stop: int
    weights: Mapping[int, str]
    nodes: Sequence[TreeNode]
    behind: str = ""
    samples: tuple[bytes, ...] = ()
    checksum: str = ""
    node: str = field(default_factory=platform.node)

    def sealed(self) -> PartialSums:
        """With the checksum of what it holds now; the arrays are shared."""
        return replace(self, checksum=self.computed_checksum())

    def computed_checksum(self) -> str:
        """Checksum of what is held; reads the arrays where they lie."""
        what = (
            self.layer,
            self.replica,
            self.start,
            self.stop,
            sorted(self.weights.items()),
            self.behind,
            self.samples,
        )
        checksum = joined(repr(what))
        for node in self.nodes:
            for name, statistics in sorted(node.statistics.items()):
                checksum = checksum_of(statistics.to_arrays(), f"{node.level} {node.index} {name}", checksum)
        return checksum

    def blocks(self) -> set[int]:
        """Reduction blocks that the sums cover."""
        return {block for n in self.nodes for block in range(n.index << n.level, (n.index + 1) << n.level)}


def check_partial_sums(
    own: PartialSums, others: Sequence[PartialSums], blocks: Sequence[tuple[int, int]], *, prefix: str
) -> None:
    """Checks that what replicas send is of one layer of one model, undamaged, and covers every micro-batch once.

    Args:
        own: what the layer's owner observed itself.
        others: what the other replicas sent.
        blocks: bounds of the reduction blocks.
        prefix: of the layer's tensors, for messages.

    Raises:
        CheckpointError: replicas hold different weights.
        LayerError: anything else.
    """
    for sums in others:
        if sums.computed_checksum() != sums.checksum:
            raise LayerError(
                f"{prefix}: the partial sums of replica {sums.replica} (node {sums.node}) were damaged on their way: "
                f"checksum {sums.computed_checksum()[:12]} instead of {sums.checksum[:12]}. Submit the same recipe "
                "again; if it happens again, check memory and network of that node"
            )
        if sums.layer != own.layer:
            raise LayerError(f"{prefix}: replica {sums.replica} sent partial sums of layer {sums.layer}")
        _check_weights(own, sums, prefix)
    ranges = sorted((s.start, s.stop, s.replica) for s in (own, *others) if s.start < s.stop)
    edges = [(0, 0, -1), *ranges, (blocks[-1][1], blocks[-1][1], -1)]
    for (_, before, left), (after, _, right) in itertools.pairwise(edges):
        if before != after:
            what = f"micro-batches {before} to {after - 1} are in none of the" if before < after else "overlapping"
            between = " and ".join(f"replica {replica}" for replica in (left, right) if replica >= 0)
            ran = ", ".join(f"replica {replica} [{start}, {stop})" for start, stop, replica in ranges)
            raise LayerError(
                f"{prefix}: {what} partial sums (see {between}; run were {ran or 'none'}, of {blocks[-1][1]}): "
                "submit the same recipe again"
            )
    for sums in (own, *others):
        expected = {i for i, (start, stop) in enumerate(blocks) if sums.start <= start < stop <= sums.stop}
        if sums.blocks() != expected:
            raise LayerError(
                f"{prefix}: replica {sums.replica} ran micro-batches [{sums.start}, {sums.stop}), which are reduction "
                f"blocks {sorted(expected)}, and its partial sums cover blocks {sorted(sums.blocks())}"
            )


def _check_weights(own: PartialSums, other: PartialSums, prefix: str) -> None:
    differing = sorted(n for n in own.weights.keys() & other.weights.keys() if own.weights[n] != other.weights[n])
    if differing:
        number = differing[0]
        what, theirs, ours = f"layer {number}", other.weights[number], own.weights[number]
    elif own.behind and other.behind and own.behind != other.behind:
        what, theirs, ours = f"the layers before layer {min(own.weights, default=own.layer)}", other.behind, own.behind
    else:
        return
    raise CheckpointError(
        f"{prefix}: the weights of {what} differ between replica {other.replica} (node {other.node}, checksum "
        f"{theirs[:12]}) and replica {own.replica} (node {own.node}, checksum {ours[:12]}): the model directory on "
        "one node is another. Put the model on storage that all nodes share, or copy it to every node again"
    )
