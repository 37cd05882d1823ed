"""Which parameters of an export are sent together: those of one owner, up to a number of bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from real_megatron.bridge.table import Parameter


@dataclass(frozen=True)
class Owner:
    """Who holds a parameter: pipeline stage, expert-parallel rank (None: all), and in which dtype."""

    stage: int
    expert_rank: int | None
    dtype: torch.dtype


@dataclass
class OwnerBucket:
    """Parameters of one owner that are sent together."""

    owner: Owner
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Elements of each whole Megatron tensor."""
        return [prod(parameter.transform.shape) for parameter in self.parameters]


def owner_buckets(everything: Sequence[Parameter], owners: Mapping[str, Owner], limit: int) -> Iterator[OwnerBucket]:
    """All parameters, owner by owner: stages in order, of each its dense part before its expert ranks; those of one
    owner in the given order. A bucket has at most `limit` bytes, or one parameter.

    In the table's order, the experts of a layer change owner with every expert-parallel rank: Qwen3-235B-A22B at EP 32
    makes 6,113 buckets of up to 512 MiB, owner by owner 893 (benchmarks/host/weights.py).
    """
    held: dict[Owner, list[Parameter]] = {}
    for parameter in everything:
        held.setdefault(owners[parameter.name], []).append(parameter)
    for owner in sorted(held, key=_place):
        bucket, size = OwnerBucket(owner), 0
        for parameter in held[owner]:
            more = prod(parameter.transform.shape) * owner.dtype.itemsize
            if bucket.parameters and size + more > limit:
                yield bucket
                bucket, size = OwnerBucket(owner), 0
            bucket.parameters.append(parameter)
            size += more
        yield bucket


def _place(owner: Owner) -> tuple[int, int, str]:
    return owner.stage, -1 if owner.expert_rank is None else owner.expert_rank, str(owner.dtype)
