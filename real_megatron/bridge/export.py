"""Export of a running Megatron model as full Hugging Face tensors, at any TP, PP, EP and virtual pipeline layout.

The parameters are visited owner by owner (bridge/owners.py), in the same order on every rank, in buckets whose shards
are gathered on all ranks or on rank 0 (bridge/gathering.py).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import parameters
from real_megatron.bridge.gathering import Gather, Groups, OnEveryRank, OnRankZero
from real_megatron.bridge.live import local_parameters, unwrap
from real_megatron.bridge.owners import Owner, owner_buckets
from real_megatron.bridge.table import Parameter


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
    about three times as much. everywhere: every rank yields; otherwise global rank 0 only. Of the others those with
    shards that it needs send them and yield nothing, and the rest, all data-parallel replicas but one, are done at
    once.

    The generator must be run to its end on every rank. The order is that of the layout's owners, not the table's. A
    tensor may share memory with the model or its bucket: make a copy to keep it. Names are those of published
    checkpoints (one tensor per expert).
    """
    groups = Groups.here()
    if not (everywhere or groups.sends_dense or (groups.sends_experts and description.num_experts)):
        return
    everything = parameters(description, vocab_rows=unwrap(models[0]).vocab_size)
    mine: dict[str, Tensor] = {}
    for parameter, tensor in local_parameters(models, description):
        # The last stage's copy of tied embeddings comes after the embedding itself.
        mine.setdefault(parameter.name, tensor.detach())
    owners = find_owners(everything, mine, description, groups)
    gather: Gather = (OnEveryRank if everywhere else OnRankZero)(groups, mine)
    for bucket in owner_buckets(everything, owners, bucket_bytes):
        wholes = gather(bucket)
        if wholes is None:
            continue
        for parameter, whole in zip(bucket.parameters, wholes, strict=True):
            for name, tensor in zip(parameter.hf, parameter.transform.split(whole), strict=True):
                yield name, tensor if dtype is None else tensor.to(dtype)


def _slot(parameter: Parameter) -> str:
    """One name for all experts of a layer."""
    if parameter.expert is None:
        return parameter.name
    return parameter.name.replace(f"local_experts.{parameter.expert}.", "local_experts.")


def find_owners(
    everything: list[Parameter], mine: dict[str, Tensor], description: ModelDescription, groups: Groups
) -> dict[str, Owner]:
    """The owner of each parameter by its name. everything: of the whole model; mine: this rank's tensors by name.

    Collective over each pipeline group, whose stages hold all that there is: no other ranks are asked.
    """
    slots = {_slot(p): mine[p.name].dtype for p in everything if p.name in mine}
    stages: list[dict[str, torch.dtype]] = [{}] * groups.stages.size()
    dist.all_gather_object(stages, slots, group=groups.stages)
    experts_per_rank = description.num_experts // groups.experts.size()
    owners = {}
    for parameter in everything:
        stage = next(i for i, slots in enumerate(stages) if _slot(parameter) in slots)
        rank = None if parameter.expert is None else parameter.expert // experts_per_rank
        owners[parameter.name] = Owner(stage, rank, stages[stage][_slot(parameter)])
    return owners
