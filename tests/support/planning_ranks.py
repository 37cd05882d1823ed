"""Rank functions for tests of estimates: what torch counts while a policy trains."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention
from megatron.core import parallel_state
from torch import Tensor

from real_megatron.batch.packing import PackedMicrobatch
from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import RunConfig
from real_megatron.head import held, ops
from real_megatron.objective import build_objective
from real_megatron.planning.saved_tensors import MicrobatchSize
from real_megatron.policy import attention
from real_megatron.policy.flex import flex_segment_attention
from real_megatron.policy.runs import runs_of
from tests.support.policy_ranks import VOCAB, make_policy
from tests.support.ranks import forget_policies


class SavedBytes:
    """Bytes of the storages that autograd holds for backward, each once: as a context, the most of them at a time.

    ignored: storages that do not count, by address.
    """

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: Counter[int] = Counter()
        self.live = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: _Held(self, x), lambda kept: kept.tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self.ignored:
            return
        before = self.holders[address]
        self.holders[address] += by
        if not before or not self.holders[address]:
            self.live += by * storage.nbytes()
            self.most = max(self.most, self.live)


class _Held:
    """A saved tensor, for as long as the graph needs it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.change(tensor, 1)

    def __del__(self) -> None:
        self.counter.change(self.tensor, -1)


def even_groups(count: int) -> list[Group]:
    """Groups of equal lengths, so that micro-batches of one group each are equally large."""
    ids = [7 * i % VOCAB for i in range(100)]
    responses = [Trajectory(ids[k : k + 50], 49, old_logprobs=[-2.0] * 50) for k in range(4)]
    return [Group(ids, responses, label=2.0) for _ in range(count)]


@contextmanager
def flex_attention_on_cpu() -> Iterator[None]:
    """Attention as on a GPU, uncompiled. torch refuses it a backward pass on the CPU, though it has one."""
    with (
        mock.patch.object(attention, "segment_attention", flex_segment_attention),
        mock.patch.object(torch.nn.attention.flex_attention, "_validate_device", lambda *args: None),
    ):
        yield


def most_saved(cases: Sequence[tuple[RunConfig, int, bool]]) -> list[tuple[int, MicrobatchSize, int]]:
    """Per (configuration, groups of a training step, whether with flex attention), on this rank: the most bytes that
    autograd holds at a time beside weights; the size of its micro-batches, of which each has one group; and how many
    there are."""
    found = []
    for config, count, flex in cases:
        policy = make_policy(config)
        groups = even_groups(count)
        microbatches = policy.planner.plan(groups).microbatches
        context = parallel_state.get_context_parallel_rank() if config.parallel.context > 1 else None
        description = policy.description
        width = description.num_heads * description.head_dim // config.parallel.tensor
        (size,) = {microbatch_size(microbatch, context, width) for microbatch in microbatches}
        weights = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
        held.idle_counts()  # measured once for all tests of this process: not among our references
        with (
            SavedBytes(weights) as saved,
            mock.patch.object(ops, "forbid_other_holders", lambda logits: None),  # the count holds them, too
            flex_attention_on_cpu() if flex else nullcontext(),
        ):
            policy.train_step(groups, build_objective(config.objective))
        assert saved.live == 0
        found.append((saved.most, size, len(microbatches)))
        del policy
        forget_policies()
    return found


def microbatch_size(microbatch: PackedMicrobatch, context: int | None, width: int) -> MicrobatchSize:
    """context: the context-parallel rank, where there are several; width: of this rank's query heads together."""
    tree = microbatch.tree
    shard = None if context is None else microbatch.shards[context]
    calls = runs_of(tree, width, None, shard, torch.device("cpu")).runs
    return MicrobatchSize(
        tree.total,
        microbatch.row_positions.numel(),
        joined_keys=sum(run.keys for run in calls if len(run.pieces) > 1),
        masked_pairs=sum((run.end - run.first) * run.keys for run in calls if run.mask is not None),
    )
