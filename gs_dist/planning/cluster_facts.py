"""What there is to run a job on: this machine, a cluster that runs, or one that is only described."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gs_dist.errors import UserError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.surroundings import Surroundings

__all__ = ["ClusterFacts"]


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """Totals over the nodes that hold workers, which are taken to be alike.

    Attributes:
        num_cpus: cores.
        num_npus: Ascend cards; 0 where there is none, or none is known.
        memory_bytes: memory as Ray counts it.
        num_nodes: nodes.
    """

    num_cpus: int
    num_npus: int
    memory_bytes: int
    num_nodes: int = 1

    @classmethod
    def of_this_machine(cls) -> ClusterFacts:
        """Cores and memory that this process may use of its machine, and the machine's Ascend cards."""
        here = Surroundings.of_this_process()
        cards = [path for path in Path("/dev").glob("davinci*") if path.name.removeprefix("davinci").isdigit()]
        return cls(num_cpus=here.num_cpus, num_npus=len(cards), memory_bytes=here.memory_bytes)

    @classmethod
    def described(
        cls, *, num_nodes: int | None, npus: int | None, cpus: int | None, memory: int | None, device: str
    ) -> ClusterFacts | None:
        """A cluster that need not run yet, of its nodes' sizes; None where nothing is said of it.

        Args:
            num_nodes: 1 where None.
            npus: cards of a node; 0 where None, unless the job needs some.
            cpus: cores of a node.
            memory: of a node, in bytes.
            device: the recipe's.

        Raises:
            UserError: part of the description is missing, or it contradicts the recipe.
        """
        if num_nodes is npus is cpus is memory is None:
            return None
        needed = {"--npus-per-node": npus} if device == DeviceKind.ASCEND else {}
        needed |= {"--cpus-per-node": cpus, "--memory-per-node": memory}
        missing = [option for option, value in needed.items() if value is None]
        if missing:
            raise UserError(
                f"the description of the cluster lacks {' and '.join(missing)}: waves and threads depend on all of "
                f"{', '.join(needed)}, and on --nodes, which is 1 where left out"
            )
        if device == DeviceKind.ASCEND and not npus:
            raise UserError(
                "parallel.device is ascend and --npus-per-node is 0: give the cards of a node, or set parallel.device "
                "to cpu"
            )
        assert cpus is not None
        assert memory is not None
        count = num_nodes or 1
        return cls(num_cpus=count * cpus, num_npus=count * (npus or 0), memory_bytes=count * memory, num_nodes=count)

    def lacking(self, *, cpus: int, npus: int) -> str:
        """`2 of 8 NPU` for what there is too little of, "" where there is enough."""
        asked = (("CPU", self.num_cpus, cpus), ("NPU", self.num_npus, npus))
        return ", ".join(f"{held} of {wanted} {name}" for name, held, wanted in asked if held < wanted)

    @property
    def memory_per_node(self) -> int:
        """Bytes."""
        return self.memory_bytes // self.num_nodes

    def of_nodes(self, count: int) -> ClusterFacts:
        """The same with `count` nodes like these."""
        return ClusterFacts(
            num_cpus=count * (self.num_cpus // self.num_nodes),
            num_npus=count * (self.num_npus // self.num_nodes),
            memory_bytes=count * self.memory_per_node,
            num_nodes=count,
        )

    def threads_share(self, num_workers: int, *, npus: int) -> int:
        """Cores of a node over its workers, where they are dealt evenly; no more of them than it has cards for.

        Args:
            num_workers: of the job, some of which may wait for nodes that are still to come.
            npus: cards that each one takes.
        """
        beside = -(-num_workers // self.num_nodes)
        if npus and self.num_npus:
            beside = min(beside, self.num_npus // self.num_nodes // npus)
        return max(1, self.num_cpus // self.num_nodes // max(1, beside))

    def workers_per_node(self, num_workers: int, *, threads: int, npus: int) -> int:
        """The most workers that one node may be given: Ray fills a node before it turns to the next.

        Args:
            num_workers: of the job.
            threads: cores that each one takes.
            npus: cards that each one takes.
        """
        even = -(-num_workers // self.num_nodes)
        most = max(even, min(num_workers, self.num_cpus // self.num_nodes // threads))
        return min(most, max(1, self.num_npus // self.num_nodes // npus)) if npus and self.num_npus else most

    def room(self, *, threads: int, npus: int) -> int:
        """Workers that there is room for, each of them on one node."""
        slots = self.num_cpus // self.num_nodes // threads
        return self.num_nodes * (min(slots, self.num_npus // self.num_nodes // npus) if npus else slots)
