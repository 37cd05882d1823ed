"""Rank functions: updates of which some see a value that is not finite, on one rank or on all, or a spike."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.config import OptimizerConfig, RunConfig
from real_megatron.objective import MetricSums, Objective, ScoredBatch, Totals, build_objective
from real_megatron.policy.optimizer import chained
from real_megatron.policy.policy import Policy
from real_megatron.policy.update_guard import FEWEST, Fault, UpdateGuard
from real_megatron.training.update import update
from tests.support.policy_ranks import make_groups, make_policy
from tests.support.ranks import forget_policies
from tests.support.tiny_runs import train


class Faulty:
    """An objective that goes wrong: `logprobs` NaN (it raises), in the `scoring` pass too, `loss` NaN, `gradient` NaN
    behind a loss that is none, or both a thousand times as large (`spike`)."""

    def __init__(self, real: Objective, kind: str) -> None:
        self.real, self.kind = real, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def advantages(self, scored: ScoredBatch) -> Tensor:
        if self.kind == "scoring":
            scored.score_logprobs = scored.score_logprobs * math.nan
        return self.real.advantages(scored)

    def __call__(self, scored: ScoredBatch, totals: Totals) -> tuple[Tensor, MetricSums]:
        if self.kind == "logprobs":
            scored.token_logprobs = scored.token_logprobs * torch.where(scored.token_trajectory == 1, math.nan, 1.0)
        loss, metrics = self.real(scored, totals)
        if self.kind == "loss":
            return loss * math.nan, {**metrics, "loss": metrics["loss"] * math.nan}
        if self.kind == "gradient":
            loss = loss + (0.0 * scored.token_logprobs).abs().sqrt().sum()
        return loss * (1000.0 if self.kind == "spike" else 1.0), metrics


def state_of(policy: Policy) -> list[Any]:
    """Weights, Adam's state and the schedule: everything that an update changes."""
    adams = [one.optimizer.state for one in chained(policy.optimizer)]
    return [
        {name: tensor.clone() for name, tensor in policy.export()},
        [
            {k: torch.as_tensor(v).clone() for k, v in one.items() if k != "master_param"}
            for state in adams
            for one in state.values()
        ],
        copy.deepcopy(policy.scheduler.state_dict()),
        [group["lr"] for group in policy.optimizer.param_groups],
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def updates(
    config: RunConfig,
    seeds: list[int],
    faults: dict[int, str] | None = None,
    rank: int | None = None,
    save: tuple[int, Path] | None = None,
    resume: Path | None = None,
) -> tuple[list[dict[str, float]], dict[str, Tensor], list[str]]:
    """One step for each of `seeds`, of which `faults` have an objective that goes wrong (on `rank` alone): the metrics,
    the weights, the warnings or the error. Asserts that a skipped update leaves everything bit by bit as it was.

    save: after how many steps, where; resume: from where
    """
    policy, metrics, said = make_policy(config), [], []
    real = build_objective(config.objective)
    if resume is not None:
        policy.load(resume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("real_megatron.training.update"), "warning", lambda t, *a: said.append(t % a))
        for done, seed in enumerate(seeds, 1):
            groups = make_groups(seed=seed)
            for i, group in enumerate(groups):
                group.example_id = f"row-{seed}-{i}"
            wrong = seed in (faults or {}) and rank in (None, dist.get_rank())
            before = state_of(policy)
            try:
                row = update(policy, groups, Faulty(real, faults[seed]) if wrong else real, 1, done)
            except FloatingPointError as error:
                assert same(before, state_of(policy))
                said.append(str(error))
                break
            if row["skipped_updates"]:
                assert same(before, state_of(policy)), "a skipped update has changed something"
            metrics.append(row)
            if save is not None and done == save[0]:
                policy.save(save[1], {"step": done})
    weights = {name: tensor.clone() for name, tensor in policy.export()}
    forget_policies()
    return metrics, weights, said


def decisions(rank: int) -> tuple[list[bool], int]:
    """What a guard says on each rank to ordinary updates, a norm that only `rank` takes for a spike, a fault that only
    it has seen, and one more; and how many were skipped."""
    mine = dist.get_rank() == rank
    guard = UpdateGuard(OptimizerConfig(spike_factor=10))
    said = [guard.skips(0.5, 1.0, [], []) for _ in range(FEWEST)]
    said.append(guard.skips(0.5, 10.1 if mine else 9.9, [], []))
    said.append(guard.skips(0.5, 1.0, [Fault("seen")] if mine else [], []))
    return [*said, guard.skips(0.5, 1.0, [], [])], guard.total


def run_with_faults(config: RunConfig, faults: dict[int, str], rank: int | None = None) -> None:
    """A whole run, whose updates of these numbers (from 1, over this start alone) go wrong, on `rank` alone."""
    real_step, count = Policy.train_step, 0

    def step(policy: Policy, groups: list, objective: Objective) -> dict[str, float]:
        nonlocal count
        count += 1
        wrong = count in faults and rank in (None, dist.get_rank())
        return real_step(policy, groups, Faulty(objective, faults[count]) if wrong else objective)

    Policy.train_step = step
    try:
        train(config)
    finally:
        Policy.train_step = real_step
