"""How the shards of a bucket become whole tensors, on every rank or on rank 0. Bytes are sent: bit-identical.

On every rank: the owners all-gather their shards over their tensor-parallel group, the owning expert-parallel rank
broadcasts to the others, the owning stage to the other stages.

On rank 0: Megatron's rank 0 is the first of each of its groups, and ranks of one stage that are first in the same kinds
of groups hold different shards of one whole copy. So one data-parallel replica sends: of the dense part that of the
ranks that are first in their data- and context-parallel group, of the experts that of the first in their expert-data-
parallel one. In it the owners' shards go to the first of their tensor-parallel group, from there to the first
expert-parallel rank, from there to the first stage, whose rank is rank 0. Nobody else receives or allocates anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from real_megatron.bridge.owners import OwnerBucket
from real_megatron.bridge.table import Parameter

Gather = Callable[[OwnerBucket], list[Tensor] | None]
"""From a bucket to the whole Megatron tensors of its parameters; None where they do not come. Collective."""


@dataclass(frozen=True)
class Groups:
    """This rank's groups that weights travel in."""

    stages: dist.ProcessGroup
    experts: dist.ProcessGroup
    tensor: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    sends_dense: bool
    """Whether it is in the replica whose dense part goes to rank 0."""
    sends_experts: bool
    """Whether it is in the one whose experts do."""

    @classmethod
    def here(cls) -> "Groups":
        """Of Megatron's parallel state. Nothing is communicated."""
        return cls(
            stages=parallel_state.get_pipeline_model_parallel_group(),
            experts=parallel_state.get_expert_model_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
            sends_dense=parallel_state.get_data_parallel_group(with_context_parallel=True).rank() == 0,
            sends_experts=parallel_state.get_expert_data_parallel_group().rank() == 0,
        )

    def holds(self, bucket: OwnerBucket) -> bool:
        """Whether this rank has shards of the bucket."""
        owner = bucket.owner
        return self.stages.rank() == owner.stage and owner.expert_rank in (None, self.experts.rank())

    def shard_group(self, bucket: OwnerBucket) -> dist.ProcessGroup:
        """Those that have the shards of one whole."""
        return self.tensor if bucket.owner.expert_rank is None else self.expert_tensor


class OnEveryRank:
    """Wholes for all. mine: this rank's tensors by the parameter's name."""

    def __init__(self, groups: Groups, mine: dict[str, Tensor]) -> None:
        self._groups, self._mine = groups, mine
        self._device = next(iter(mine.values())).device

    def __call__(self, bucket: OwnerBucket) -> list[Tensor]:
        groups, owner = self._groups, bucket.owner
        alone = groups.stages.size() == 1 and (owner.expert_rank is None or groups.experts.size() == 1)
        shards = None
        if groups.holds(bucket):
            shards = _all_shards(bucket, self._mine, groups.shard_group(bucket))
            if alone:
                return _merged(bucket, shards)
        flat = _empty(bucket, self._device)
        if shards is not None:
            _merge_into(bucket, shards, flat)
            del shards
        if owner.expert_rank is not None and groups.stages.rank() == owner.stage and groups.experts.size() > 1:
            dist.broadcast(flat.view(torch.uint8), group=groups.experts, group_src=owner.expert_rank)
        if groups.stages.size() > 1:
            dist.broadcast(flat.view(torch.uint8), group=groups.stages, group_src=owner.stage)
        return _wholes(bucket, flat)


class OnRankZero:
    """Wholes for rank 0 alone; see the module. mine: this rank's tensors by the parameter's name.

    Made by all ranks of the replicas that send, since NCCL forms a group's communicator when all its ranks come
    together, and not for messages between two of them: the pipeline group's has been formed by who looks up owners.
    """

    def __init__(self, groups: Groups, mine: dict[str, Tensor]) -> None:
        self._groups, self._mine = groups, mine
        self._device = next(iter(mine.values())).device
        self._sends_on_experts = groups.sends_experts and groups.expert_tensor.rank() == 0
        self._sends_on_stages = groups.sends_dense and groups.tensor.rank() == 0
        if self._sends_on_experts and groups.experts.size() > 1:
            dist.all_reduce(torch.zeros(1, device=self._device), group=groups.experts)

    def __call__(self, bucket: OwnerBucket) -> list[Tensor] | None:
        groups, owner = self._groups, bucket.owner
        sends = groups.sends_dense if owner.expert_rank is None else groups.sends_experts
        flat: Tensor | None = None
        if sends and groups.holds(bucket):
            shards = _first_ranks_shards(bucket, self._mine, groups.shard_group(bucket))
            if shards is not None and dist.get_rank() == 0:
                return _merged(bucket, shards)
            if shards is not None:
                flat = _empty(bucket, self._device)
                _merge_into(bucket, shards, flat)
                del shards
        if owner.expert_rank and groups.stages.rank() == owner.stage and self._sends_on_experts:
            flat = self._to_first(bucket, flat, groups.experts, owner.expert_rank)
        if owner.stage and self._sends_on_stages:
            flat = self._to_first(bucket, flat, groups.stages, owner.stage)
        return None if flat is None else _wholes(bucket, flat)

    def _to_first(
        self, bucket: OwnerBucket, flat: Tensor | None, group: dist.ProcessGroup, source: int
    ) -> Tensor | None:
        """From rank `source` of a group, which has `flat`, to its first one."""
        if group.rank() == source:
            assert flat is not None
            _message(dist.isend, flat, group, 0)
        elif group.rank() == 0:
            flat = _empty(bucket, self._device)
            _message(dist.irecv, flat, group, source)
            return flat
        return None


def _message(action: Callable, flat: Tensor, group: dist.ProcessGroup, peer: int) -> None:
    # As a batch of one: NCCL would make a communicator of its own, with buffers, for each pair of single messages.
    for work in dist.batch_isend_irecv([dist.P2POp(action, flat.view(torch.uint8), group=group, group_peer=peer)]):
        work.wait()


def _all_shards(bucket: OwnerBucket, mine: dict[str, Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """Per parameter its shards on all tensor-parallel ranks, in rank order, on each of them."""
    tensors = _tensors(bucket, mine)
    if group.size() == 1:
        return [[tensor] for tensor in tensors]
    flat = _flat(tensors)
    gathered = flat.new_empty(group.size(), flat.numel())
    dist.all_gather([row.view(torch.uint8) for row in gathered], flat.view(torch.uint8), group=group)
    return _by_parameter(tensors, gathered)


def _first_ranks_shards(
    bucket: OwnerBucket, mine: dict[str, Tensor], group: dist.ProcessGroup
) -> list[list[Tensor]] | None:
    """As `_all_shards` on the first tensor-parallel rank; None on the others."""
    tensors = _tensors(bucket, mine)
    if group.size() == 1:
        return [[tensor] for tensor in tensors]
    flat = _flat(tensors)
    if group.rank():
        dist.gather(flat.view(torch.uint8), group=group, group_dst=0)
        return None
    gathered = flat.new_empty(group.size(), flat.numel())
    dist.gather(flat.view(torch.uint8), [row.view(torch.uint8) for row in gathered], group=group, group_dst=0)
    return _by_parameter(tensors, gathered)


def _tensors(bucket: OwnerBucket, mine: dict[str, Tensor]) -> list[Tensor]:
    return [mine[parameter.name] for parameter in bucket.parameters]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _by_parameter(tensors: list[Tensor], gathered: Tensor) -> list[list[Tensor]]:
    per_rank = [row.split([tensor.numel() for tensor in tensors]) for row in gathered]
    return [[shards[i].view(tensor.shape) for shards in per_rank] for i, tensor in enumerate(tensors)]


def _empty(bucket: OwnerBucket, device: torch.device) -> Tensor:
    return torch.empty(sum(bucket.sizes), dtype=bucket.owner.dtype, device=device)


def _wholes(bucket: OwnerBucket, flat: Tensor) -> list[Tensor]:
    parts = zip(bucket.parameters, flat.split(bucket.sizes), strict=True)
    return [part.view(parameter.transform.shape) for parameter, part in parts]


def _merged(bucket: OwnerBucket, shards: list[list[Tensor]]) -> list[Tensor]:
    return [p.transform.merge(own) for p, own in _with(bucket.parameters, shards)]


def _merge_into(bucket: OwnerBucket, shards: list[list[Tensor]], flat: Tensor) -> None:
    for (parameter, own), whole in zip(_with(bucket.parameters, shards), _wholes(bucket, flat), strict=True):
        parameter.transform.merge(own, out=whole)


def _with(parameters: list[Parameter], shards: list[list[Tensor]]) -> list[tuple[Parameter, list[Tensor]]]:
    return list(zip(parameters, shards, strict=True))
