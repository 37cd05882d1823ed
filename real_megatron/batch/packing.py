"""Groups → packed micro-batches: which tokens run, and which rows ask the output head for which vocabulary ids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import TokenShard
from real_megatron.batch.token_tree import TokenTree
from real_megatron.batch.types import Group, Trajectory
from real_megatron.scores import ScoreTree


@dataclass
class PackedMicrobatch:
    """Whole groups, packed without padding between sequences.

    The head is asked for two kinds of rows. Token rows (first) ask one id each: the next token of a loss-carrying
    response token. Answer rows (then) ask the ids of the score tree's branches, one row a branch, behind the answer
    position of trajectories that have one.
    """

    tokens: Tensor
    """Token ids, int64 `[T]`."""
    tree: SegmentTree
    """Where the sequences are, and which attends to which."""
    row_positions: Tensor
    """Index into `tokens` of each head row, int64 `[R]`."""
    ids: Tensor
    """Vocabulary ids asked for, int64 `[nnz]`: one per token row, then those of all branches per answer."""
    offsets: Tensor
    """Row r asks `ids[offsets[r]:offsets[r + 1]]`, int64 `[R + 1]`."""
    token_trajectory: Tensor
    """Trajectory index of each token row, int64 `[N_tok]`."""
    answer_trajectory: Tensor
    """Trajectory index of each answer, int64 `[N_answer]`. An answer has as many rows as the score tree has branches,
    one behind the other."""
    group: Tensor
    """Group index of each trajectory, int64 `[N]`."""
    labels: Tensor
    """Ground-truth score of each trajectory, float32 `[N]`; of several aspects `[N, A]`, NaN where there is none."""
    old_logprobs: Tensor | None
    """Log-probability under the sampling policy per token row, float32 `[N_tok]`."""
    ref_logprobs: Tensor | None
    """Log-probability under the reference policy per token row, float32 `[N_tok]`."""
    advantages: Tensor | None
    """Precomputed advantages `[N]`, when the group is split over micro-batches."""
    sampled: Tensor | None
    """Index of the score behind each trajectory's anchor, int64 `[N]`; see `sampled_scores`."""
    responses: list[tuple[str, dict[str, Any]]] | None
    """Text of each trajectory and metadata of its data row; None unless every trajectory has a text."""
    examples: list[str] = field(default_factory=list)
    """Id of each trajectory's data row, for messages `[N]`."""
    shards: tuple[TokenShard, ...] | None = None
    """The tokens of each context-parallel rank; None when one rank runs them all."""

    @property
    def num_trajectories(self) -> int:
        return self.group.numel()


def pack(
    groups: Sequence[Group], scores: ScoreTree, share_prompt: bool = True, multiple: int = 1, empty: int = 1
) -> PackedMicrobatch:
    """Pack whole groups into one micro-batch; see `pack_trees`. share_prompt: as of `TokenTree`."""
    return pack_trees([TokenTree(group, scores, share_prompt) for group in groups], scores, multiple, empty)


def pack_trees(trees: Sequence[TokenTree], scores: ScoreTree, multiple: int = 1, empty: int = 1) -> PackedMicrobatch:
    """Pack whole groups, laid out already, into one micro-batch.

    scores: the tree of scores that they were laid out with. The total is padded to a multiple of `multiple` tokens
    (context and sequence parallelism shard it), by a segment that no row reads. An empty list packs to padding alone,
    `empty` tokens or more.

    Raises ValueError when some trajectories have log-probs or an advantage and others have none.
    """
    groups = [tree.group for tree in trees]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    tokens: list[int] = []
    segments: list[Segment] = []
    token_rows: list[list[int]] = []
    answer_rows: list[list[int]] = []
    for tree in trees:
        start, first = len(tokens), len(segments)
        tokens += tree.tokens
        parents = (None if parent is None else parent + first for parent in tree.parents)
        segments += map(Segment, tree.lengths, parents)
        token_rows += tree.token_rows(start)
        answer_rows += tree.answer_rows(start)
    wanted = len(tokens) or empty
    padding = wanted + -wanted % multiple - len(tokens)
    if padding:
        tokens += [0] * padding
        segments.append(Segment(padding))
    token_ids = [id for t in trajectories for id, keep in zip(t.response_ids, t.loss_mask, strict=True) if keep]
    answered = [i for i, trajectory in enumerate(trajectories) if trajectory.answer_index is not None]
    asked = [id for branch in scores.branches for id in branch.ids]
    widths = torch.tensor([len(branch.ids) for branch in scores.branches]).repeat(len(answered))
    return PackedMicrobatch(
        tokens=torch.tensor(tokens, dtype=torch.long),
        tree=SegmentTree(tuple(segments)),
        row_positions=torch.tensor([*chain(*token_rows), *chain(*answer_rows)], dtype=torch.long),
        ids=torch.cat((torch.tensor(token_ids, dtype=torch.long), torch.tensor(asked).repeat(len(answered)))),
        offsets=torch.cat((torch.arange(len(token_ids) + 1), len(token_ids) + widths.cumsum(0))),
        token_trajectory=torch.repeat_interleave(torch.tensor(list(map(len, token_rows)), dtype=torch.long)),
        answer_trajectory=torch.tensor(answered, dtype=torch.long),
        group=torch.tensor([g for g, group in enumerate(groups) for _ in group.trajectories], dtype=torch.long),
        labels=labels_of(groups),
        old_logprobs=_per_token(trajectories, "old_logprobs"),
        ref_logprobs=_per_token(trajectories, "ref_logprobs"),
        advantages=_advantages(trajectories),
        sampled=sampled_scores(groups, scores),
        responses=responses_of(groups),
        examples=[group.example_id for group in groups for _ in group.trajectories],
    )


def tree_of(group: Group, scores: ScoreTree, share_prompt: bool = True) -> SegmentTree:
    """The segments of one group, as `pack` arranges them."""
    return TokenTree(group, scores, share_prompt).segments


def tokens_of(group: Group, scores: ScoreTree, share_prompt: bool = True) -> int:
    """Tokens that a group occupies in a micro-batch."""
    return TokenTree(group, scores, share_prompt).total


def rows_of(group: Group, scores: ScoreTree) -> int:
    """Rows of a group that reach the output head: loss-carrying tokens, and the branches of each answer."""
    return TokenTree(group, scores).rows


def labels_of(groups: Sequence[Group]) -> Tensor:
    """The label of each trajectory in order, float32 `[N]`; of several aspects `[N, A]`, NaN where there is none."""
    if any(group.labels for group in groups):
        rows = [[math.nan if y is None else y for y in group.labels] for group in groups for _ in group.trajectories]
        return torch.tensor(rows, dtype=torch.float32)
    return torch.tensor([group.label for group in groups for _ in group.trajectories], dtype=torch.float32)


def sampled_scores(groups: Sequence[Group], scores: ScoreTree) -> Tensor | None:
    """Index of the score that the tokens behind each trajectory's answer position say, int64 `[N]`, in order.

    -1 where they say none, and where there is no answer position. None where an answer position is a response's last
    token: no score was sampled.
    """
    found = []
    for trajectory in (t for group in groups for t in group.trajectories):
        if trajectory.answer_index is None:
            found.append(-1)
            continue
        if not trajectory.score_tokens:
            return None
        score, _ = scores.read(trajectory.score_tokens)
        found.append(-1 if score is None else score)
    return torch.tensor(found, dtype=torch.long)


def responses_of(groups: Sequence[Group]) -> list[tuple[str, dict[str, Any]]] | None:
    """(text, metadata of the data row) of each trajectory in order; None unless every trajectory has a text."""
    responses = []
    for group in groups:
        for trajectory in group.trajectories:
            if trajectory.text is None:
                return None
            responses.append((trajectory.text, group.meta))
    return responses


def _per_token(trajectories: list[Trajectory], name: str) -> Tensor | None:
    """Values of the loss-carrying tokens, or None when no trajectory has them."""
    values: list[float] = []
    missing = 0
    for trajectory in trajectories:
        per_token = getattr(trajectory, name)
        if per_token is None:
            missing += 1
        else:
            values += [x for x, keep in zip(per_token, trajectory.loss_mask, strict=True) if keep]
    if missing == len(trajectories):
        return None
    if missing:
        raise ValueError(f"{missing} of {len(trajectories)} trajectories have no {name}: all or none must have them")
    return torch.tensor(values, dtype=torch.float32)


def _advantages(trajectories: list[Trajectory]) -> Tensor | None:
    values = [t.advantage for t in trajectories if t.advantage is not None]
    if not values:
        return None
    if len(values) < len(trajectories):
        raise ValueError("split groups (with advantages) and whole groups (without) cannot share a micro-batch")
    return torch.tensor(values, dtype=torch.float32)
