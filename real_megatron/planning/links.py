"""How fast groups of ranks communicate, by where Megatron-Core puts them.

Ranks that differ in tensor-parallel rank only are neighbours; then come context, data and pipeline ranks. Experts have
tensor, expert and data ranks in this order.
"""

from dataclasses import dataclass

from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import Efficiency


@dataclass(frozen=True)
class Group:
    """A group of `size` ranks, of which `local` are on each node."""

    gpu: Gpu
    efficiency: Efficiency
    size: int
    local: int

    @property
    def between_nodes(self) -> bool:
        """Whether it spans several nodes."""
        return self.local < self.size

    @property
    def where(self) -> str:
        """For names of parts."""
        return "between nodes" if self.between_nodes else "within a node"

    @property
    def bandwidth(self) -> float:
        """Bytes/s of each rank in a ring. Between nodes, the ring uses the adapters of all its ranks on a node."""
        inside = self.gpu.nvlink * self.efficiency.nvlink
        if not self.between_nodes:
            return inside
        return min(inside, self.local * self.gpu.network * self.efficiency.network)

    @property
    def latency(self) -> float:
        """Seconds of an empty collective."""
        return self.efficiency.network_latency if self.between_nodes else self.efficiency.nvlink_latency

    def gather(self, size: float, calls: float = 1.0) -> float:
        """Seconds of `calls` all-gathers or reduce-scatters whose wholes have `size` bytes together. An all-reduce is
        one of each."""
        if self.size == 1:
            return 0.0
        return (self.size - 1) / self.size * size / self.bandwidth + calls * self.latency

    def all_to_all(self, size: float, calls: float = 1.0) -> float:
        """Seconds of `calls` all-to-alls in which each rank sends `size` bytes together, evenly to all ranks."""
        if self.size == 1:
            return 0.0
        inside = (self.local - 1) / self.size * size / (self.gpu.nvlink * self.efficiency.nvlink)
        outside = (self.size - self.local) / self.size * size / (self.gpu.network * self.efficiency.network)
        return max(inside, outside) + calls * self.latency

    def send(self, size: float, calls: float = 1.0) -> float:
        """Seconds of `calls` messages to the next rank, `size` bytes together; also a broadcast's, which is a chain."""
        if self.size == 1:
            return 0.0
        outside = self.gpu.network * self.efficiency.network
        return size / (outside if self.between_nodes else self.bandwidth) + calls * self.latency


def group(gpu: Gpu, efficiency: Efficiency, stride: int, size: int) -> Group:
    """A group whose ranks are `stride` apart."""
    return Group(gpu, efficiency, size, min(size, max(1, gpu.per_node // stride)))
