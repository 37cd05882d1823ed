"""Which micro-batches a step runs: groups distributed over data-parallel ranks, split where too long, and packed.

Knows the sizes of the parallel layout but no process group: every rank computes the whole plan from the same groups,
and takes its own micro-batches. Nothing is communicated, and ranks that differ in tensor, pipeline or context rank only
get the same micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from real_megatron.batch.balance import balance, imbalance
from real_megatron.batch.packing import PackedMicrobatch, pack, rows_of, tokens_of, tree_of
from real_megatron.batch.shards import shard_tokens
from real_megatron.batch.types import Group
from real_megatron.bridge import ModelDescription
from real_megatron.config import BatchConfig, ParallelConfig
from real_megatron.policy import flops
from real_megatron.policy.block_mask import BLOCK


@dataclass(frozen=True)
class Distribution:
    """Where the groups of a training step run."""

    microbatches: list[list[list[Group]]]
    """Per data-parallel rank its micro-batches, not packed yet: whole groups, or subgroups."""
    metrics: dict[str, float]
    """See `Planner.plan`."""


@dataclass(frozen=True)
class Plan:
    """One data-parallel rank's micro-batches of a training step, and metrics of the whole plan."""

    microbatches: list[PackedMicrobatch]
    metrics: dict[str, float]
    """See `Planner.plan`."""


@dataclass(frozen=True)
class Planner:
    """Plans the micro-batches of data-parallel rank `data_rank` of `data_size`.

    description: the model, for the FLOPs that the plan evens out. score_ids: vocabulary ids of the scores.
    """

    description: ModelDescription
    score_ids: Sequence[int]
    parallel: ParallelConfig
    batch: BatchConfig
    data_rank: int
    data_size: int

    def plan(self, groups: Sequence[Group], scoring_pass: bool = False) -> Plan:
        """The micro-batches of one update on the global batch `groups` (the same list on every rank).

        Groups beyond the token budget are split. scoring_pass: those have run through the model once already, which
        gave their trajectories advantages.

        Subgroups and whole groups never share a micro-batch. An objective computes a whole group's advantages itself,
        from the rewards of this very forward pass, whereas a subgroup's must be given, since its other responses are
        elsewhere; and a micro-batch either brings advantages or does not. The two kinds are therefore balanced one
        after the other. Each time all ranks get equally many micro-batches, perhaps some of padding alone: every
        forward and backward pass is collective over ranks, and so is the reduction of gradients that follows.

        Metrics: `microbatches` (of all ranks), `imbalance` (fraction of the busiest data-parallel rank's work for which
        the average one waits), `tokens` (run through the model, the scoring pass included), `information_tokens`
        (prompts once, and responses), `model_flops` (of those, forward and backward) and `split_groups`.
        """
        found = self.arrange(groups, scoring_pass)
        return Plan([self.pack(mine) for mine in found.microbatches[self.data_rank]], found.metrics)

    def arrange(self, groups: Sequence[Group], scoring_pass: bool = False) -> Distribution:
        """The micro-batches of all data-parallel ranks, as `plan` packs them."""
        whole = [group for group in groups if self.fits(group)]
        large = [group for group in groups if not self.fits(group)]
        subgroups = [subgroup for group in large for subgroup in self.split(group)]
        microbatches: list[list[list[Group]]] = [[] for _ in range(self.data_size)]
        count, waiting, work = 0, 0.0, 0.0
        for kind in (whole, subgroups):
            if not kind:
                continue
            costs = [self._flops(group, self.batch.share_prompt) for group in kind]
            distributed = self._balance(kind, costs)
            for mine, chosen in zip(microbatches, distributed, strict=True):
                mine += [[kind[i] for i in items] for items in chosen]
            count += sum(len(mine) for mine in distributed)
            waiting += imbalance(costs, distributed) * sum(costs)
            work += sum(costs)
        tokens = sum(map(self._tokens, [*whole, *subgroups]))
        if scoring_pass:
            # Subgroups again: that pass has split the same groups in the same way.
            tokens += sum(map(self._tokens, subgroups))
        return Distribution(
            microbatches,
            {
                "microbatches": float(count),
                "imbalance": waiting / work,
                "tokens": float(tokens),
                "information_tokens": float(sum(tokens_of(group) for group in groups)),
                "model_flops": sum(self._flops(group, share_prompt=True) for group in groups),
                "split_groups": float(len(large)),
            },
        )

    def distribute(self, groups: Sequence[Group]) -> list[list[list[int]]]:
        """Per data-parallel rank its micro-batches, as lists of indices of `groups`, with even FLOPs."""
        return self._balance(groups, [self._flops(group, self.batch.share_prompt) for group in groups])

    def fits(self, group: Group) -> bool:
        """Whether the group is within the token budget of a micro-batch."""
        return self._tokens(group) <= self.batch.max_tokens

    def split(self, group: Group) -> list[Group]:
        """The group, or subgroups of it within the token budget (one trajectory alone always makes one)."""
        if self.fits(group):
            return [group]
        subgroups: list[Group] = []
        for trajectory in group.trajectories:
            grown = replace(group, trajectories=[*subgroups[-1].trajectories, trajectory]) if subgroups else None
            if grown and self.fits(grown):
                subgroups[-1] = grown
            else:
                subgroups.append(replace(group, trajectories=[trajectory]))
        return subgroups

    def pack(self, groups: Sequence[Group]) -> PackedMicrobatch:
        """Pack one micro-batch; under context parallelism with the tokens of each rank."""
        parallel = self.parallel
        # Context-parallel ranks have equally many tokens, which sequence parallelism shards evenly once more.
        multiple = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
        # Padding alone is a block of queries a rank: for the few tokens of `multiple` attention would compile anew.
        microbatch = pack(groups, self.score_ids, self.batch.share_prompt, multiple, empty=BLOCK * parallel.context)
        if parallel.context == 1:
            return microbatch
        costs = flops.uneven_flops(self.description, microbatch.tree, microbatch.row_positions)
        return replace(microbatch, shards=shard_tokens(costs, parallel.context))

    def _balance(self, groups: Sequence[Group], costs: Sequence[float]) -> list[list[list[int]]]:
        return balance(
            costs,
            [self._tokens(group) for group in groups],
            self.batch.max_tokens,
            self.data_size,
            # The interleaved schedule runs micro-batches in rounds of the pipeline size.
            multiple=self.parallel.pipeline if self.parallel.virtual_pipeline else 1,
        )

    def _tokens(self, group: Group) -> int:
        return tokens_of(group, self.batch.share_prompt)

    def _flops(self, group: Group, share_prompt: bool) -> float:
        return flops.training_flops(self.description, tree_of(group, share_prompt), rows_of(group))
