"""The optimizer updates of one batch, one for each of its mini-batches."""

import logging
from collections.abc import Sequence
from statistics import fmean

from real_megatron.batch.types import Group
from real_megatron.objective import Objective
from real_megatron.policy.policy import Policy

logger = logging.getLogger(__name__)

_COUNTED = ("tokens", "information_tokens", "model_flops", "microbatches", "split_groups", "skipped_updates")


def mini_batches(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """The groups in order, in `count` lists whose lengths differ by one at most; never an empty one."""
    count = min(count, len(groups))
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [list(groups[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def update(policy: Policy, groups: Sequence[Group], objective: Objective, count: int, step: int) -> dict[str, float]:
    """One optimizer update per mini-batch of the batch; metrics are means (maxima: the largest) over the updates that
    were made, counts are sums over all.

    step: counted from 1, for the warning about an update that is skipped

    `updates`: those that were made; `skipped_updates`: those that were not, `skipped_updates_total` in the whole run.
    Where none was made, what the objective measures is left out. Collective. Raises FloatingPointError as
    `Policy.train_step` does.
    """
    results = []
    for number, mini_batch in enumerate(mini_batches(groups, count)):
        result = policy.train_step(mini_batch, objective)
        if result["skipped_updates"] and policy.runtime.rank == 0:
            which = f"update {number + 1} is" if count > 1 else "the update is"
            row = f", {policy.guard.in_a_row} in a row" if policy.guard.in_a_row > 1 else ""
            logger.warning("step %d: %s skipped%s: %s", step, which, row, policy.guard.last)
        results.append(result)
    names = {name: None for result in results for name in result}
    metrics = {
        name: (max if name.endswith("/max") else fmean)([r[name] for r in results if name in r]) for name in names
    }
    for name in _COUNTED:
        metrics[name] = sum(result[name] for result in results)
    metrics["updates"] = len(results) - metrics["skipped_updates"]
    metrics["skipped_updates_total"] = float(policy.guard.total)
    return metrics
