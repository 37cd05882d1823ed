"""A run in which one rank sleeps in a step: as a rank function, and as a program for torchrun (`CONFIG STEP RANK`)."""

import ctypes
import os
import sys
import time

from real_megatron.config import RunConfig
from real_megatron.policy.policy import Policy
from real_megatron.training import rl, watchdog
from tests.support.tiny_runs import train


def sleep_in_the_step(holding: bool) -> None:
    """For ever; with Python's interpreter lock where `holding`."""
    if holding:
        ctypes.PyDLL(None).sleep(10_000)
    time.sleep(10_000)


def hang_at(step: int, rank: int, holding: bool = False) -> None:
    """From now on, rank `rank` sleeps in the update of step `step` (from 1)."""
    real_step, count = Policy.train_step, 0

    def train_step(policy: Policy, *args: object) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == step and policy.runtime.rank == rank:
            sleep_in_the_step(holding)
        return real_step(policy, *args)

    Policy.train_step = train_step


def hanging(config: RunConfig, step: int, rank: int, holding: bool = False) -> None:
    """A run that hangs; the process ends."""
    watchdog.GRACE_S = 5.0
    hang_at(step, rank, holding)
    train(config)


if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        hang_at(int(sys.argv[2]), int(sys.argv[3]))
    rl.train(RunConfig.from_yaml(sys.argv[1]))
