"""Groups → packed micro-batches: which tokens run, and which rows ask the output head for which vocabulary ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import TokenShard
from real_megatron.batch.types import Group, Trajectory


@dataclass
class PackedMicrobatch:
    """Whole groups, packed without padding between sequences.

    The head is asked for two kinds of rows. Token rows (first) ask one id each: the next token of a loss-carrying
    response token. Answer rows (then) ask all score ids at the answer position of trajectories that have one.
    """

    tokens: Tensor
    """Token ids, int64 `[T]`."""
    tree: SegmentTree
    """Where the sequences are, and which attends to which."""
    row_positions: Tensor
    """Index into `tokens` of each head row, int64 `[R]`."""
    ids: Tensor
    """Vocabulary ids asked for, int64 `[nnz]`: one per token row, then all score ids per answer row."""
    offsets: Tensor
    """Row r asks `ids[offsets[r]:offsets[r + 1]]`, int64 `[R + 1]`."""
    token_trajectory: Tensor
    """Trajectory index of each token row, int64 `[N_tok]`."""
    answer_trajectory: Tensor
    """Trajectory index of each answer row, int64 `[N_answer]`."""
    group: Tensor
    """Group index of each trajectory, int64 `[N]`."""
    labels: Tensor
    """Ground-truth score of each trajectory, float32 `[N]`."""
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
    groups: Sequence[Group], score_ids: Sequence[int], share_prompt: bool = True, multiple: int = 1, empty: int = 1
) -> PackedMicrobatch:
    """Pack whole groups into one micro-batch.

    With `share_prompt` a group is packed as [prompt | response 1 | … | response K], the prompt's tokens once;
    without, as K whole sequences. The total is padded to a multiple of `multiple` tokens (context and sequence
    parallelism shard it), by a segment that no row reads. An empty list packs to padding alone, `empty` tokens or more.

    Raises ValueError when some trajectories have log-probs or an advantage and others have none.
    """
    tokens: list[int] = []
    segments: list[Segment] = []
    token_positions: list[int] = []
    token_ids: list[int] = []
    token_trajectory: list[int] = []
    answer_positions: list[int] = []
    answer_trajectory: list[int] = []
    trajectories: list[Trajectory] = []
    group_index: list[int] = []

    for g, group in enumerate(groups):
        prompt_length = len(group.prompt_ids)
        prompt_start = len(tokens)
        first = len(segments)
        segments += [
            replace(s, parent=None if s.parent is None else s.parent + first)
            for s in tree_of(group, share_prompt).segments
        ]
        if share_prompt:
            tokens += group.prompt_ids
        for trajectory in group.trajectories:
            if not share_prompt:
                prompt_start = len(tokens)
                tokens += group.prompt_ids
            start = len(tokens)
            tokens += trajectory.response_ids
            index = len(trajectories)
            for t, (token, carries_loss) in enumerate(zip(trajectory.response_ids, trajectory.loss_mask, strict=True)):
                if carries_loss:
                    # The row that predicts token t is the one before it: the prompt's last for the first.
                    token_positions.append(start + t - 1 if t else prompt_start + prompt_length - 1)
                    token_ids.append(token)
                    token_trajectory.append(index)
            if trajectory.answer_index is not None:
                answer_positions.append(start + trajectory.answer_index)
                answer_trajectory.append(index)
            trajectories.append(trajectory)
            group_index.append(g)

    wanted = len(tokens) or empty
    padding = wanted + -wanted % multiple - len(tokens)
    if padding:
        tokens += [0] * padding
        segments.append(Segment(padding))
    offsets = torch.cat(
        (
            torch.arange(len(token_ids)),
            len(token_ids) + len(score_ids) * torch.arange(len(answer_positions) + 1),
        )
    )
    return PackedMicrobatch(
        tokens=torch.tensor(tokens, dtype=torch.long),
        tree=SegmentTree(tuple(segments)),
        row_positions=torch.tensor(token_positions + answer_positions, dtype=torch.long),
        ids=torch.tensor(token_ids + list(score_ids) * len(answer_positions), dtype=torch.long),
        offsets=offsets,
        token_trajectory=torch.tensor(token_trajectory, dtype=torch.long),
        answer_trajectory=torch.tensor(answer_trajectory, dtype=torch.long),
        group=torch.tensor(group_index, dtype=torch.long),
        labels=torch.tensor([group.label for group in groups for _ in group.trajectories], dtype=torch.float32),
        old_logprobs=_per_token(trajectories, "old_logprobs"),
        ref_logprobs=_per_token(trajectories, "ref_logprobs"),
        advantages=_advantages(trajectories),
        sampled=sampled_scores(groups, score_ids),
        responses=responses_of(groups),
        examples=[groups[g].example_id for g in group_index],
    )


def tree_of(group: Group, share_prompt: bool = True) -> SegmentTree:
    """The segments of one group, as `pack` arranges them."""
    prompt = len(group.prompt_ids)
    if not share_prompt:
        return SegmentTree(tuple(Segment(prompt + len(t.response_ids)) for t in group.trajectories))
    responses = (Segment(len(t.response_ids), parent=0) for t in group.trajectories if t.response_ids)
    return SegmentTree((Segment(prompt), *responses))


def tokens_of(group: Group, share_prompt: bool = True) -> int:
    """Tokens that a group occupies in a micro-batch."""
    prompts = 1 if share_prompt else len(group.trajectories)
    return prompts * len(group.prompt_ids) + sum(len(t.response_ids) for t in group.trajectories)


def rows_of(group: Group) -> int:
    """Rows of a group that reach the output head: loss-carrying tokens and answers."""
    return sum(sum(t.loss_mask) + (t.answer_index is not None) for t in group.trajectories)


def sampled_scores(groups: Sequence[Group], score_ids: Sequence[int]) -> Tensor | None:
    """Index in `score_ids` of the token behind each trajectory's answer position, int64 `[N]`, in order.

    -1 where that token is no score, and where there is no answer position. None where an answer position is a
    response's last token: no score was sampled.
    """
    index = {score: k for k, score in enumerate(score_ids)}
    found = []
    for trajectory in (t for group in groups for t in group.trajectories):
        if trajectory.answer_index is None:
            found.append(-1)
        elif trajectory.answer_index + 1 < len(trajectory.response_ids):
            found.append(index.get(trajectory.response_ids[trajectory.answer_index + 1], -1))
        else:
            return None
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
