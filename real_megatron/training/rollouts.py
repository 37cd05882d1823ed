"""A step's rollouts before they are trained on: which groups are kept, their log-probs, how varied they are."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group, Trajectory
from real_megatron.errors import UserError
from real_megatron.objective import mismatch_metrics, summarize
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreTree, decode
from real_megatron.training.metrics import distinct_n
from real_megatron.training.reference import spread

PATIENCE = 10
"""Steps in a row without a single answer after which a run ends: with hundreds of responses a step, no accident."""


class NothingToTrain(UserError):
    """No group of a step's rollouts, or of many steps in a row, can be trained on."""

    on_every_rank = True


def trainable(groups: Sequence[Group], smallest: int) -> list[Group]:
    """The groups with at least `smallest` responses. Raises NothingToTrain when none is left."""
    kept = [group for group in groups if len(group.trajectories) >= smallest]
    if not kept:
        raise NothingToTrain(
            f"none of the {len(groups)} prompts kept {smallest} responses with a score anchor: warm the model up with "
            "`real-megatron sft`, raise data.max_response_tokens, or set objective.no_anchor to penalize or force"
        )
    return kept


def steps_without_answer(groups: Sequence[Group], before: float, scores: ScoreTree | None = None) -> float:
    """How many steps in a row, this one included, had no response with an answer, after `before` such steps.

    scores: of the scale, where the reward needs a sampled score: the anchor alone is no answer then

    Raises NothingToTrain at `PATIENCE`: rewards are equal then, and no term has a gradient.
    """
    answers = (t for group in groups for t in group.trajectories if t.answer_index is not None)
    if any(scores is None or scores.read(t.score_tokens)[0] is not None for t in answers):
        return 0.0
    if before + 1 >= PATIENCE:
        raise NothingToTrain(
            f"no response of the last {PATIENCE} steps has a score anchor{'' if scores is None else ' and a score'}, "
            "so that none is better than another: warm the model up with `real-megatron sft`, raise "
            "data.max_response_tokens, or set objective.no_anchor to force"
        )
    return before + 1


def with_texts(tokenizer: PreTrainedTokenizerBase, groups: Sequence[Group]) -> list[Group]:
    """The groups with the decoded text of every response, for rewards that read it."""
    return [
        replace(group, trajectories=[replace(t, text=decode(tokenizer, t.response_ids)) for t in group.trajectories])
        for group in groups
    ]


def with_policy_logprobs(policy: Policy, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    """The groups with the policy's own log-probs as `old_logprobs`, and the `mismatch_metrics` of the engine's."""
    scored = policy.logprobs(groups)
    annotated = [
        replace(
            group,
            trajectories=[
                replace(t, old_logprobs=spread(t, s.tokens)) for t, s in zip(group.trajectories, row, strict=True)
            ],
        )
        for group, row in zip(groups, scored, strict=True)
    ]
    engine = [
        logprob
        for group in groups
        for t in group.trajectories
        for logprob, sampled in zip(t.old_logprobs or (), t.loss_mask, strict=True)
        if sampled
    ]
    own = [logprob for row in scored for s in row for logprob in s.tokens]
    return annotated, summarize(mismatch_metrics(torch.tensor(own), torch.tensor(engine)))


def cot_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How varied the CoTs of a batch are: distinct-n over all of them, and the share of exact copies within groups."""
    cots = [[_cot(t) for t in group.trajectories] for group in groups]
    responses = [cot for row in cots for cot in row]
    copies = sum(len(row) - len({cot.tobytes() for cot in row}) for row in cots)
    metrics = {f"cot/distinct_{n}": distinct_n(responses, n) for n in (1, 2, 3)}
    metrics["cot/copies"] = copies / len(responses) if responses else math.nan
    return metrics


def _cot(trajectory: Trajectory) -> NDArray[np.int64]:
    """Token ids of CoT and anchor, without a sampled score."""
    end = None if trajectory.answer_index is None else trajectory.answer_index + 1
    return np.array(trajectory.response_ids[:end], np.int64)
