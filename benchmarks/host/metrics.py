"""Metrics and log-probs of a step, from all data-parallel ranks to all: as pickled objects, and as tensors.

`METRICS` metrics a rank, as many as a step of REAL has; log-probs of 2,048 responses of 600 tokens, as the reference
of a KL term gives them, an equal share on each rank. Bytes are those of the collectives' results on a rank.
"""

import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.host.ranks import run
from benchmarks.host.row import Row
from real_megatron.policy.gathering import gather_metrics, gather_uneven
from real_megatron.policy.policy import TrajectoryLogprobs

METRICS = 40
RESPONSES, TOKENS, SCORES = 2048, 600, 5
REPEATS = 5
CPU = torch.device("cpu")


def rows(ranks: int) -> list[Row]:
    """Both parts, both ways."""
    found = []
    for part, work in (("metrics of a step", metrics), ("log-probs of a step", logprobs)):
        results = run(ranks, work)
        for variant in ("before", "after"):
            seconds = max(one[variant][0] for one in results)
            moved = max(one[variant][1] for one in results)
            found.append(Row(part, variant, ranks, seconds, moved, None, "measured"))
    return found


def metrics() -> dict[str, tuple[float, float]]:
    """One rank: seconds and bytes of each way."""
    mine = {f"metric_{i}": torch.tensor([0.5 * i, 8.0], dtype=torch.float64) for i in range(METRICS)}
    world = dist.get_world_size()
    return {
        "before": (_timed(lambda: _gather_objects(mine)), float(world * len(pickle.dumps(mine)))),
        "after": (
            _timed(lambda: gather_metrics(mine, dist.group.WORLD, CPU)),
            float(world * 8 * (2 + 3 * METRICS)),
        ),
    }


def logprobs() -> dict[str, tuple[float, float]]:
    """One rank: seconds and bytes of each way, until it has the lists that training reads."""
    world, rank = dist.get_world_size(), dist.get_rank()
    share = [RESPONSES // world + (i < RESPONSES % world) for i in range(world)]
    numbers = torch.randn(share[rank], TOKENS + SCORES)
    objects = {i: [TrajectoryLogprobs(row[:TOKENS], row[TOKENS:])] for i, row in enumerate(numbers.tolist())}
    sizes = [one * (TOKENS + SCORES) for one in share]

    def tensors() -> list[Any]:
        return [row.tolist() for row in gather_uneven(numbers.reshape(-1), sizes, dist.group.WORLD, CPU)]

    return {
        "before": (_timed(lambda: _gather_objects(objects)), float(world * len(pickle.dumps(objects)))),
        "after": (_timed(tensors), float(4 * world * max(sizes))),
    }


def _gather_objects(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some repeats, which all ranks begin together."""
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
