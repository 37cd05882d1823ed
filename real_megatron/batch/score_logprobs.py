"""log π of every score, from the log-probs that the branches of a score tree ask for."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

from real_megatron.scores import ScoreTree

RESOLUTION = 1e-6
"""Float32 log-probs near 0 are known to about this. Where the tokens that go on are surer to follow than that, the
probability of all others counts as this much; the gradient remains."""


def score_logprobs(tree: ScoreTree, logprobs: Tensor) -> Tensor:
    """log π(k) of every score, `[..., tree.size]`, with gradient, in the dtype of `logprobs`: the sum along the path of
    a spelling, and where that could go on also of its end; of several spellings the logarithm of their sum.

    logprobs: log π of what an answer asks for, over the whole vocabulary `[..., tree.width]`, in the order of
        `tree.branches`
    """
    if tree.direct:
        return logprobs
    rests, steps, members = _places(tree, logprobs.device)
    lead = logprobs.shape[:-1]
    columns = [logprobs]
    if rests is not None:
        # float64: the sum of likely tokens is near 1, and what is left of it is wanted.
        never = logprobs.new_full((*lead, 1), -torch.inf)
        going_on = torch.cat([logprobs, never], dim=-1).double().exp()[..., rests].sum(-1)
        limited = going_on - (going_on - (1 - RESOLUTION)).clamp(min=0).detach()
        columns.append(torch.log1p(-limited).to(logprobs.dtype))
    columns.append(logprobs.new_zeros((*lead, 1)))
    spelled = torch.cat(columns, dim=-1)[..., steps].sum(-1)
    if members is None:
        return spelled
    never = logprobs.new_full((*lead, 1), -torch.inf)
    return torch.cat([spelled, never], dim=-1)[..., members].logsumexp(-1)


@lru_cache(maxsize=16)
def _places(tree: ScoreTree, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Which columns are put together, padded with the column behind the last one.

    Of each spelling that must end, the tokens that must not follow (None without such spellings); of each spelling its
    steps, and where it must end the column of that; of each score its spellings (None where each has one).
    """
    rests = [spelling.rest for spelling in tree.spellings if spelling.rest]
    steps, endings = [], count(tree.width)
    for spelling in tree.spellings:
        steps.append([*spelling.steps, next(endings)] if spelling.rest else list(spelling.steps))
    members: list[list[int]] = [[] for _ in tree.paths]
    for column, spelling in enumerate(tree.spellings):
        members[spelling.score].append(column)
    return (
        _padded(rests, tree.width, device) if rests else None,
        _padded(steps, tree.width + len(rests), device),
        _padded(members, len(steps), device) if len(steps) > tree.size else None,
    )


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)
