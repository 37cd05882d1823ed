"""The reinforcement-learning loop: sample, score, update, hand the weights to the rollout engine."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.objective import Objective, build_objective, check, minimum_group_size
from real_megatron.policy.policy import Policy
from real_megatron.sections import ConfigError
from real_megatron.training.metrics import distinct_n
from real_megatron.training.phases import PhaseTimer
from real_megatron.training.reference import ReferenceWeights, spread
from real_megatron.training.sampler import rollout_seed

logger = logging.getLogger(__name__)


class NothingToTrain(RuntimeError):
    """No group of a step's rollouts can be trained on."""


def trainable(groups: Sequence[Group], smallest: int) -> list[Group]:
    """The groups with at least `smallest` responses. Raises NothingToTrain when none is left."""
    kept = [group for group in groups if len(group.trajectories) >= smallest]
    if not kept:
        raise NothingToTrain(
            f"none of the {len(groups)} prompts kept {smallest} responses with a score anchor: warm the model up with "
            "`real-megatron sft`, raise rollout.max_new_tokens, or set objective.no_anchor to penalize or force"
        )
    return kept


def with_policy_logprobs(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """The groups with the policy's own log-probs as `old_logprobs`. Collective."""
    scored = policy.logprobs(groups)
    return [
        replace(
            group,
            trajectories=[
                replace(t, old_logprobs=spread(t, s.tokens)) for t, s in zip(group.trajectories, row, strict=True)
            ],
        )
        for group, row in zip(groups, scored, strict=True)
    ]


def parts(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """The groups in order, cut into `count` parts whose sizes differ by one at most; fewer when there are fewer groups."""
    count = min(count, len(groups))
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [list(groups[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def update(policy: Policy, groups: Sequence[Group], objective: Objective, updates: int) -> dict[str, float]:
    """One optimizer update per part of the rollout batch; metrics are means over the updates. Collective."""
    results = [policy.train_step(part, objective) for part in parts(groups, updates)]
    names = {name: None for result in results for name in result}
    metrics = {name: fmean([r[name] for r in results if name in r]) for name in names}
    metrics["tokens"] = sum(result["tokens"] for result in results)
    metrics["updates"] = float(len(results))
    return metrics


def cot_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How varied the CoTs of a batch are: distinct-n over all of them, and the share of exact copies within groups."""
    responses = [t.response_ids for group in groups for t in group.trajectories]
    copies = sum(len(group.trajectories) - len({tuple(t.response_ids) for t in group.trajectories}) for group in groups)
    metrics = {f"cot/distinct_{n}": distinct_n(responses, n) for n in (1, 2, 3)}
    metrics["cot/copies"] = copies / len(responses) if responses else math.nan
    return metrics
