"""What data-parallel ranks tell each other of a pass, as tensors: metrics, and log-probs.

Pickled objects would be padded to the largest rank's, and read again by every rank one number at a time.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.objective import MetricSums


def gather_metrics(mine: MetricSums, group: dist.ProcessGroup, device: torch.device) -> list[MetricSums]:
    """The metrics of every rank of `group`, in rank order, float64 on the host. Collective.

    device: where the group's backend takes tensors from. Two collectives, of a few numbers a metric and rank; ranks
    with other metrics than the rest, as after a fault, send theirs as objects.
    """
    names = [(name, value.dim()) for name, value in mine.items()]
    values = [value.double().cpu().reshape(-1) for value in mine.values()]
    # How many numbers a metric has differs between ranks for samples alone: that is said in front of the numbers.
    flat = torch.cat([torch.tensor([value.numel() for value in values], dtype=torch.float64), *values])
    headers = _gather(torch.tensor([_digest(names), flat.numel()]), group, device)
    if len({int(header[0]) for header in headers}) > 1:
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        return everyone
    gathered = gather_uneven(flat, [int(header[1]) for header in headers], group, device)
    found = []
    for one in gathered:
        sizes = [int(size) for size in one[: len(names)].tolist()]
        parts = one[len(names) :].split(sizes)
        found.append({name: part[None] if dim == 2 else part for (name, dim), part in zip(names, parts, strict=True)})
    return found


def gather_uneven(mine: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """The vectors of every rank of `group`, in rank order, on the host; rank i's has `sizes[i]` numbers. Collective."""
    padded = torch.zeros(max(sizes), dtype=mine.dtype)
    padded[: mine.numel()] = mine
    return [row[:size] for row, size in zip(_gather(padded, group, device), sizes, strict=True)]


def broadcast_from(
    mine: Tensor | None, size: int, source: int, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """The float32 vector of `size` numbers that global rank `source` of `group` has, on the host. Collective."""
    flat = torch.empty(size) if mine is None else mine
    flat = flat.to(device)
    dist.broadcast(flat, src=source, group=group)
    return flat.cpu()


def _gather(mine: Tensor, group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    gathered = torch.empty(group.size(), mine.numel(), dtype=mine.dtype, device=device)
    dist.all_gather(list(gathered), mine.to(device), group=group)
    return list(gathered.cpu())


def _digest(names: Sequence[tuple[str, int]]) -> int:
    """Of which metrics there are, the same in every process; fits int64."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big")
