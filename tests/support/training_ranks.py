"""Rank functions of the training tests."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.objective import build_objective
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreScale
from real_megatron.training.export import save_hf
from real_megatron.training.reference import ReferenceWeights
from real_megatron.training.rollouts import with_policy_logprobs
from real_megatron.training.stop import StopSignal
from real_megatron.training.update import update
from tests.support.policy_ranks import make_groups, make_policy


def reference_after_steps(config: RunConfig) -> tuple[list, list, bool]:
    """Log-probs of fixed groups before training, the reference's after two steps, and whether weights came back."""
    policy = make_policy(config)
    groups = make_groups(seed=7)
    before = [[t.old_logprobs for t in g.trajectories] for g in with_policy_logprobs(policy, groups)[0]]
    reference = ReferenceWeights(policy)
    objective = build_objective(config.objective)
    for step in range(2):
        policy.train_step(make_groups(seed=step), objective)
    trained = {name: tensor.clone() for name, tensor in policy.export()}
    annotated = [[t.ref_logprobs for t in g.trajectories] for g in reference.annotate(groups)]
    same = all(torch.equal(tensor, trained[name]) for name, tensor in policy.export())
    moved = [[t.old_logprobs for t in g.trajectories] for g in with_policy_logprobs(policy, groups)[0]]
    assert moved != before
    return before, annotated, same


def asked_to_stop(receiver: int) -> tuple[bool, bool]:
    """What a rank is told before and after rank `receiver` alone gets SIGTERM."""
    with StopSignal(torch.device("cpu")) as signals:
        before = signals.requested()
        if dist.get_rank() == receiver:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, signals.requested()


def two_updates(config: RunConfig) -> tuple[dict[str, float], list[dict[str, float]]]:
    """One rollout batch in two updates, and the same groups given to the policy mini-batch by mini-batch."""
    groups = make_groups(count=5)
    objective = build_objective(config.objective)
    whole = update(make_policy(config), groups, objective, count=2, step=1)
    policy = make_policy(config)
    return whole, [policy.train_step(part, objective) for part in (groups[:2], groups[2:])]


def export_after_steps(config: RunConfig, output: Path) -> dict[str, torch.Tensor]:
    """Two steps, then the checkpoint in small shards; the weights as streamed."""
    policy = make_policy(config)
    for step in range(2):
        policy.train_step(make_groups(seed=step), build_objective(config.objective))
    save_hf(policy, output, max_file_bytes=20_000)
    return {name: tensor.clone() for name, tensor in policy.export()}


def scored_by_the_policy(
    config: RunConfig, groups: list[Group], scale: ScoreScale
) -> list[tuple[list[float], list[float] | None]]:
    """Log-probs of the loss-carrying tokens and of the scores, for every trajectory."""
    policy = Policy(config, scale.tree, scale.values, total_updates=10)
    return [(t.tokens, t.scores) for group in policy.logprobs(groups) for t in group]
