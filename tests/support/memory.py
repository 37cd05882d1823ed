"""Rank function: what a long run holds in memory, step by step."""

import ctypes
import gc
from collections import Counter
from typing import Any

import psutil
import pytest

from real_megatron.config import RunConfig
from real_megatron.training.step_log import StepLog
from tests.support.tiny_runs import train


def reading() -> tuple[int, Counter[str], int]:
    """Resident bytes, and living objects by type, after what is garbage has gone back to the system; the resident bytes
    of child processes, which are the rollout servers."""
    gc.unfreeze()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    counts = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    process = psutil.Process()
    servers = sum(child.memory_info().rss for child in process.children(recursive=True))
    return process.memory_info().rss, counts, servers


def memory_of_steps(config: RunConfig, steps: list[int]) -> dict[int, tuple[int, Counter[str], int]]:
    """`reading` behind each of these steps of a run."""
    found: dict[int, tuple[int, Counter[str], int]] = {}
    real_step = StepLog.step

    def step(log: StepLog, done: int, *args: Any) -> None:
        real_step(log, done, *args)
        if done in steps:
            found[done] = reading()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "step", step)
        train(config)
    return found
