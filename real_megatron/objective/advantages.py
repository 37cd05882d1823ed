"""Advantages: rewards compared with the other responses to the same prompt. Plain numbers, never differentiated."""

import torch
from torch import Tensor

from real_megatron.config import Baseline

STD_EPS = 1e-6


def minimum_group_size(baseline: Baseline, std_normalize: bool = False) -> int:
    """Fewest responses a group needs: 2 where a reward is compared with the others', else 1."""
    return 1 if baseline == "none" and not std_normalize else 2


def advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    baseline: Baseline = "rloo",
    std_normalize: bool = False,
    clamp: float | None = None,
) -> Tensor:
    """[N] advantages from rewards [N] and group ids [N] (int64, 0..G-1, G ≤ N), in the rewards' dtype.

    `rloo`: A_i = r_i − mean_{j≠i} r_j, unbiased. `group_mean`: A_i = r_i − mean_j r_j, which is (K−1)/K of it.
    Then, where asked, divided by the group's standard deviation (K−1 in the denominator, + 1e-6) as in GRPO, and
    clamped to [−clamp, clamp]. Sums run in float64, so that equal rewards give exactly zero.

    Raises ValueError for a group too small to compare.
    """
    r = rewards.detach().double()
    if r.numel() == 0:
        return rewards.detach()
    ones = torch.ones_like(r)
    size = torch.zeros_like(r).index_add(0, group, ones)[group]
    if minimum_group_size(baseline, std_normalize) > 1 and bool((size < 2).any()):
        raise ValueError(
            f"a group holds a single response: baseline {baseline!r}"
            f"{' with std_normalize' if std_normalize else ''} compares at least two. Raise rollout.n, leave out "
            "groups that `no_anchor: drop` has shrunk to one response, or set objective.baseline to none"
        )
    mean = torch.zeros_like(r).index_add(0, group, r)[group] / size
    centred = r - mean
    if baseline == "rloo":
        a = centred * size / (size - 1)
    elif baseline == "group_mean":
        a = centred
    elif baseline == "none":
        a = r
    else:
        raise ValueError(f"unknown baseline {baseline!r}; known: rloo, group_mean, none")
    if std_normalize:
        variance = torch.zeros_like(r).index_add(0, group, centred**2)[group] / (size - 1)
        a = a / (variance.sqrt() + STD_EPS)
    if clamp is not None:
        a = a.clamp(-clamp, clamp)
    return a.to(rewards.dtype)
