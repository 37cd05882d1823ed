"""What ranks gather from each other, for tests/policy/test_gathering.py."""

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.objective import MetricSums
from real_megatron.policy.gathering import gather_metrics, gather_uneven

CPU = torch.device("cpu")


def metrics_of(rank: int) -> MetricSums:
    """A pair, a maximum and a sample, of which rank 1 has no values."""
    return {
        "loss": torch.tensor([0.1 + rank, 1.0]),
        "largest": torch.tensor([0.3 * rank]),
        "rewards": torch.arange(rank + 1.0)[None] / 3 if rank != 1 else torch.zeros(1, 0),
    }


def gather(odd: int | None = None) -> list[MetricSums]:
    """All ranks' metrics as this rank gets them; rank `odd` has the loss alone."""
    mine = metrics_of(dist.get_rank())
    return gather_metrics({"loss": mine["loss"]} if dist.get_rank() == odd else mine, dist.group.WORLD, CPU)


def gather_vectors(sizes: list[int]) -> list[Tensor]:
    """Rank i's vector has `sizes[i]` numbers, all i."""
    rank = dist.get_rank()
    return gather_uneven(torch.full((sizes[rank],), float(rank)), sizes, dist.group.WORLD, CPU)
