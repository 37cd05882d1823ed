"""Which groups share a micro-batch, and which data-parallel rank runs it."""

import heapq
import math
from collections.abc import Sequence


def balance(
    costs: Sequence[float], sizes: Sequence[int], budget: int, ranks: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Distribute items over the micro-batches of data-parallel ranks.

    costs: what an item takes to run (FLOPs, for example), evened out. sizes: its tokens, of which a micro-batch holds
    at most `budget`, unless one item alone has more. Returns, per rank, its micro-batches as lists of item indices.
    Every rank has the same number of micro-batches, a multiple of `multiple` (the interleaved pipeline schedule needs
    one of the pipeline size), and the fewest that fit.

    Items are assigned by longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969):
    each item, costliest first, goes to the micro-batch with the least work. Micro-batches are then assigned to ranks
    the same way. Deterministic, so that every rank computes the same plan.
    """
    step = ranks * multiple
    count = max(1, math.ceil(sum(sizes) / budget / step)) * step
    while True:
        bins = longest_first(costs, count)
        if all(len(b) <= 1 or sum(sizes[i] for i in b) <= budget for b in bins):
            break
        count += step
    loads = [sum(costs[i] for i in b) for b in bins]
    plan = longest_first(loads, ranks, capacity=count // ranks)
    return [[sorted(bins[i]) for i in sorted(mine)] for mine in plan]


def imbalance(costs: Sequence[float], plan: Sequence[Sequence[Sequence[int]]]) -> float:
    """Fraction of the busiest rank's work for which an average rank waits: 1 − mean / max of the ranks' total costs."""
    loads = [sum(costs[i] for microbatch in mine for i in microbatch) for mine in plan]
    return 1.0 - sum(loads) / len(loads) / max(loads) if max(loads) > 0 else 0.0


def longest_first(costs: Sequence[float], count: int, capacity: int | None = None) -> list[list[int]]:
    """Assign items to `count` bins of at most `capacity` items, costliest first, each to the least loaded bin that is
    not full."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, b) for b in range(count)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, b = heapq.heappop(heap)
        bins[b].append(item)
        if capacity is None or len(bins[b]) < capacity:
            heapq.heappush(heap, (load + costs[item], b))
    return bins
