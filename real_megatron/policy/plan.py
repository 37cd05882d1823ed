"""Which micro-batches a step runs: groups distributed over data-parallel ranks, split where too long, and packed.

Knows the sizes of the parallel layout but no process group: every rank computes the whole plan from the same groups,
and takes its own micro-batches. Nothing is communicated, and ranks that differ in tensor, pipeline or context rank only
get the same micro-batches.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from real_megatron.batch.balance import balance, imbalance
from real_megatron.batch.packing import PackedMicrobatch, pack_trees
from real_megatron.batch.shards import shard_tokens
from real_megatron.batch.token_tree import TokenTree
from real_megatron.batch.types import Group
from real_megatron.bridge import ModelDescription
from real_megatron.config import BatchConfig, ParallelConfig
from real_megatron.policy import flops
from real_megatron.policy.block_mask import BLOCK
from real_megatron.scores import ScoreTree


@dataclass(frozen=True)
class Distribution:
    """Where the groups of a training step run."""

    microbatches: list[list[list[TokenTree]]]
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

    description: the model, for the FLOPs that the plan evens out. tree: of the scores' tokens.
    """

    description: ModelDescription
    tree: ScoreTree
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
        (every distinct one once: prompts, responses and the branches that scores are read on), `model_flops` (of those,
        forward and backward), `shared_beginnings` (fraction of response tokens that are not run, since another response
        of the micro-batch begins with them) and `split_groups`.
        """
        found = self.arrange(groups, scoring_pass)
        return Plan([self.pack(mine) for mine in found.microbatches[self.data_rank]], found.metrics)

    def arrange(self, groups: Sequence[Group], scoring_pass: bool = False) -> Distribution:
        """The micro-batches of all data-parallel ranks, as `plan` packs them."""
        trees = [self.token_tree(group) for group in groups]
        whole = [tree for tree in trees if self.fits(tree)]
        large = [tree for tree in trees if not self.fits(tree)]
        parts = [part for tree in large for part in self.split(tree)]
        microbatches: list[list[list[TokenTree]]] = [[] for _ in range(self.data_size)]
        count, waiting, work = 0, 0.0, 0.0
        for kind in (whole, parts):
            if not kind:
                continue
            costs = [self._flops(tree) for tree in kind]
            distributed = self._balance(kind, costs)
            for mine, chosen in zip(microbatches, distributed, strict=True):
                mine += [[kind[i] for i in items] for items in chosen]
            count += sum(len(mine) for mine in distributed)
            waiting += imbalance(costs, distributed) * sum(costs)
            work += sum(costs)
        run = [*whole, *parts]
        tokens = sum(tree.total for tree in run)
        if scoring_pass:
            # Subgroups again: that pass has split the same groups in the same way.
            tokens += sum(part.total for part in parts)
        shared = trees if self.batch.share_prompt else [TokenTree(group, self.tree) for group in groups]
        responses = sum(len(t.response_ids) for group in groups for t in group.trajectories)
        return Distribution(
            microbatches,
            {
                "microbatches": float(count),
                "imbalance": waiting / work,
                "tokens": float(tokens),
                "information_tokens": float(sum(tree.total for tree in shared)),
                "model_flops": sum(self._flops(tree) for tree in shared),
                "shared_beginnings": sum(tree.repeated for tree in run) / max(1, responses),
                "split_groups": float(len(large)),
            },
        )

    def distribute(self, trees: Sequence[TokenTree]) -> list[list[list[int]]]:
        """Per data-parallel rank its micro-batches, as lists of indices of `trees`, with even FLOPs."""
        return self._balance(trees, [self._flops(tree) for tree in trees])

    def token_tree(self, group: Group) -> TokenTree:
        """The tokens of a group, as its micro-batch has them."""
        return TokenTree(group, self.tree, self.batch.share_prompt)

    def fits(self, tree: TokenTree) -> bool:
        """Whether a group is within the token budget of a micro-batch."""
        return tree.total <= self.batch.max_tokens

    def split(self, tree: TokenTree) -> list[TokenTree]:
        """The group, or subgroups of it within the token budget (one trajectory alone always makes one)."""
        if self.fits(tree):
            return [tree]
        group, parts = tree.group, list[TokenTree]()
        rest = list(group.trajectories)

        def beginning(count: int) -> TokenTree:
            return self.token_tree(replace(group, trajectories=rest[:count]))

        while rest:
            counts = range(1, len(rest) + 1)
            count = max(1, bisect_right(counts, self.batch.max_tokens, key=lambda count: beginning(count).total))
            parts.append(beginning(count))
            rest = rest[count:]
        return parts

    def pack(self, trees: Sequence[TokenTree]) -> PackedMicrobatch:
        """Pack one micro-batch; under context parallelism with the tokens of each rank."""
        parallel = self.parallel
        # Context-parallel ranks have equally many tokens, which sequence parallelism shards evenly once more.
        multiple = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
        # Padding alone is a block of queries a rank: for the few tokens of `multiple` attention would compile anew.
        microbatch = pack_trees(trees, self.tree, multiple, empty=BLOCK * parallel.context)
        if parallel.context == 1:
            return microbatch
        costs = flops.uneven_flops(self.description, microbatch.tree, microbatch.row_positions)
        return replace(microbatch, shards=shard_tokens(costs, parallel.context))

    def _balance(self, trees: Sequence[TokenTree], costs: Sequence[float]) -> list[list[list[int]]]:
        return balance(
            costs,
            [tree.total for tree in trees],
            self.batch.max_tokens,
            self.data_size,
            # The interleaved schedule runs micro-batches in rounds of the pipeline size.
            multiple=self.parallel.pipeline if self.parallel.virtual_pipeline else 1,
        )

    def _flops(self, tree: TokenTree) -> float:
        return flops.training_flops(self.description, tree.segments, tree.rows)
