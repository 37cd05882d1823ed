"""The optimizer updates of one rollout batch, one for each of its mini-batches."""

from collections.abc import Sequence
from statistics import fmean

from real_megatron.batch.types import Group
from real_megatron.objective import Objective
from real_megatron.policy.policy import Policy

_COUNTED = ("tokens", "information_tokens", "model_flops", "microbatches", "split_groups")


def mini_batches(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """The groups in order, in `count` lists whose lengths differ by one at most; never an empty one."""
    count = min(count, len(groups))
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [list(groups[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def update(policy: Policy, groups: Sequence[Group], objective: Objective, count: int) -> dict[str, float]:
    """One optimizer update per mini-batch of the rollout batch; metrics are means (maxima: the largest) over the
    updates, counts are sums.

    Collective.
    """
    results = [policy.train_step(mini_batch, objective) for mini_batch in mini_batches(groups, count)]
    names = {name: None for result in results for name in result}
    metrics = {
        name: (max if name.endswith("/max") else fmean)([r[name] for r in results if name in r]) for name in names
    }
    for name in _COUNTED:
        metrics[name] = sum(result[name] for result in results)
    metrics["updates"] = float(len(results))
    return metrics
