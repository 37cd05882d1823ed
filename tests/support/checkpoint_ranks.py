"""Policies that save and load in more than one way, for tests/policy/test_optimizer_shards.py."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from benchmarks.host.checkpoints import load_whole, save_gathered
from real_megatron.config import RunConfig
from real_megatron.objective import build_objective
from real_megatron.policy import checkpoint
from real_megatron.policy.checkpoint_errors import explain_checkpoint_errors
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


def save_and_go_on(config: RunConfig, directory: Path) -> tuple[bool, str]:
    """Save at once, and begin to save the same state, of which nothing is written until a further step is done.

    Returns whether the save was under way during that step, and what is said where the writing process of a further
    save is killed.
    """
    policy, objective = make_policy(config), build_objective(config.objective)
    policy.train_step(make_groups(), objective)
    policy.save(directory / "at once", {})
    real, stepped = FileSystemWriterAsync.write_preloaded_data_multiproc, multiprocessing.get_context("fork").Event()

    def late(*args: Any) -> None:
        stepped.wait()
        real(*args)

    with patch.object(FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(late)):
        pending = policy.begin_save(directory / "beside", {})
    with patch.object(FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(lambda *_: signal.pause())):
        killed = policy.begin_save(directory / "killed", {})
    policy.train_step(make_groups(seed=1), objective)
    os.kill(killed._process.pid, signal.SIGKILL)  # before what all wait for
    under_way = not pending.done()
    os.kill(pending._process.pid, signal.SIGTERM)  # as to a whole process group
    stepped.set()
    pending.finish()
    message = ""
    try:
        with explain_checkpoint_errors("the checkpoint: cannot be written", "try again"):
            killed.finish()
    except OSError as error:
        message = str(error)
    return under_way, message


def _differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
