"""Export of a running Megatron model as full Hugging Face tensors, at any TP, PP, EP and virtual pipeline layout.

The parameters are visited in the table's order, the same on every rank, in buckets. Per bucket: the owning pipeline
stage all-gathers the shards over its tensor-parallel group, the owning expert-parallel rank broadcasts to the other
expert-parallel ranks, the stage broadcasts to the other stages. Bytes are sent, so the values are bit-identical.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import parameters
from real_megatron.bridge.live import local_parameters, shard_of, unwrap
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

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes) * self.owner.dtype.itemsize


def export_hf(
    models: Sequence[nn.Module],
    description: ModelDescription,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 512 * 2**20,
    everywhere: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for the whole model, in the same order on every rank. Collective.

    models: this rank's chunks (GPTModel, wrapped or not). dtype: convert to it; default: as the model holds them.
    bucket_bytes: limit on what is gathered at once (a larger single tensor makes a bucket of its own); the peak is
    about three times as much. everywhere: every rank yields; otherwise global rank 0 only, and the others
    take part and yield nothing.

    The generator must be run to its end on every rank. A tensor may share memory with the model or its bucket: make a
    copy to keep it. Names are those of published checkpoints (one tensor per expert).
    """
    everything = parameters(description, vocab_rows=unwrap(models[0]).vocab_size)
    mine: dict[str, Tensor] = {}
    for parameter, tensor in local_parameters(models, description):
        # The last stage's copy of tied embeddings comes after the embedding itself.
        mine.setdefault(parameter.name, tensor.detach())
    owners = _owners(everything, mine, description)
    silent = not everywhere and dist.get_rank() != 0
    for bucket in _buckets(everything, owners, bucket_bytes):
        wholes = _gather(bucket, mine)
        if silent:
            continue
        for parameter, whole in zip(bucket.parameters, wholes, strict=True):
            for name, tensor in zip(parameter.hf, parameter.transform.split(whole), strict=True):
                yield name, tensor if dtype is None else tensor.to(dtype)


def _slot(parameter: Parameter) -> str:
    """One name for all experts of a layer."""
    if parameter.expert is None:
        return parameter.name
    return parameter.name.replace(f"local_experts.{parameter.expert}.", "local_experts.")


def _owners(everything: list[Parameter], mine: dict[str, Tensor], description: ModelDescription) -> dict[str, Owner]:
    group = parallel_state.get_pipeline_model_parallel_group()
    slots = {_slot(p): mine[p.name].dtype for p in everything if p.name in mine}
    stages: list[dict[str, torch.dtype]] = [{}] * group.size()
    dist.all_gather_object(stages, slots, group=group)
    experts_per_rank = description.num_experts // parallel_state.get_expert_model_parallel_world_size()
    owners = {}
    for parameter in everything:
        stage = next(i for i, slots in enumerate(stages) if _slot(parameter) in slots)
        rank = None if parameter.expert is None else parameter.expert // experts_per_rank
        owners[parameter.name] = Owner(stage, rank, stages[stage][_slot(parameter)])
    return owners


def _buckets(everything: list[Parameter], owners: dict[str, Owner], limit: int) -> Iterator[OwnerBucket]:
    bucket: OwnerBucket | None = None
    for parameter in everything:
        owner = owners[parameter.name]
        size = prod(parameter.transform.shape) * owner.dtype.itemsize
        if bucket is None or bucket.owner != owner or bucket.bytes + size > limit:
            if bucket is not None:
                yield bucket
            bucket = OwnerBucket(owner)
        bucket.parameters.append(parameter)
    if bucket is not None:
        yield bucket


def _gather(bucket: OwnerBucket, mine: dict[str, Tensor]) -> list[Tensor]:
    """The whole Megatron tensors of a bucket, on every rank."""
    owner = bucket.owner
    stages = parallel_state.get_pipeline_model_parallel_group()
    experts = None if owner.expert_rank is None else parallel_state.get_expert_model_parallel_group()
    on_stage = stages.rank() == owner.stage
    holds = on_stage and (experts is None or experts.rank() == owner.expert_rank)
    if holds:
        shards = _shards(bucket, [mine[parameter.name] for parameter in bucket.parameters])
        if stages.size() == 1 and (experts is None or experts.size() == 1):
            return [p.transform.merge(s) for p, s in zip(bucket.parameters, shards, strict=True)]
    device = next(iter(mine.values())).device
    flat = torch.empty(sum(bucket.sizes), dtype=owner.dtype, device=device)
    wholes = [
        whole.view(parameter.transform.shape)
        for parameter, whole in zip(bucket.parameters, flat.split(bucket.sizes), strict=True)
    ]
    if holds:
        for parameter, whole, own_shards in zip(bucket.parameters, wholes, shards, strict=True):
            parameter.transform.merge(own_shards, out=whole)
        del shards
    if experts is not None and on_stage and experts.size() > 1:
        dist.broadcast(flat.view(torch.uint8), group=experts, group_src=owner.expert_rank)
    if stages.size() > 1:
        dist.broadcast(flat.view(torch.uint8), group=stages, group_src=owner.stage)
    return wholes


def _shards(bucket: OwnerBucket, tensors: list[Tensor]) -> list[list[Tensor]]:
    """Per parameter, its shards on all tensor-parallel ranks, in rank order."""
    size = shard_of(bucket.parameters[0])[1]
    if size == 1:
        return [[tensor] for tensor in tensors]
    if bucket.owner.expert_rank is None:
        group = parallel_state.get_tensor_model_parallel_group()
    else:
        group = parallel_state.get_expert_tensor_parallel_group()
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    gathered = flat.new_empty(size, flat.numel())
    dist.all_gather([row.view(torch.uint8) for row in gathered], flat.view(torch.uint8), group=group)
    per_rank = [row.split([tensor.numel() for tensor in tensors]) for row in gathered]
    return [[shards[i].view(tensor.shape) for shards in per_rank] for i, tensor in enumerate(tensors)]
