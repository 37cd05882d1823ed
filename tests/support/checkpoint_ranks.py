"""Policies that save and load in more than one way, for tests/policy/test_optimizer_shards.py."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.host.checkpoints import load_whole, save_gathered
from real_megatron.config import RunConfig
from real_megatron.objective import build_objective
from real_megatron.policy import checkpoint
from real_megatron.policy.optimizer import chained
from real_megatron.policy.policy import Policy
from tests.support.policy_ranks import make_groups, make_policy


def state_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, and of its part of the optimizer's state."""
    models = checkpoint.model_state_to_load(policy.chunks)
    shards = checkpoint.optimizer_shards(chained(policy.optimizer), models)
    found = {f"{piece.key} {piece.global_offset}": piece.data.clone() for piece in shards.values()}
    return found | {name: p.detach().clone() for chunk in policy.chunks for name, p in chunk.named_parameters()}


def old_and_new(config: RunConfig, directory: Path) -> dict[str, Any]:
    """What is not as it was when a policy that has gone on loads its state, which either way has written, either way.

    A step in between changes all of it.
    """
    policy, objective = make_policy(config), build_objective(config.objective)
    policy.train_step(make_groups(), objective)
    expected = state_of(policy)
    save_gathered(policy, directory / "old", {})
    policy.save(directory / "new", {})
    policy.train_step(make_groups(seed=1), objective)
    found: dict[str, Any] = {"moved by a step": _differences(state_of(policy), expected) != []}
    for name, load, written in (
        ("old by new", Policy.load, "old"),
        ("new by old", load_whole, "new"),
        ("new by new", Policy.load, "new"),
    ):
        load(policy, directory / written)
        found[name] = _differences(state_of(policy), expected)
        policy.train_step(make_groups(seed=1), objective)
    return found


def _differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
