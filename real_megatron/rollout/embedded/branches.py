"""Log-probs behind the branches of a score tree, from a Hugging Face model with its KV cache."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from real_megatron.scores import Branch


def furthest_paths(branches: Sequence[Branch]) -> list[tuple[int, ...]]:
    """The paths on which all branches lie: those that are not the beginning of another. None where no branch has a
    path."""
    paths = dict.fromkeys(branch.path for branch in branches)
    return [path for path in paths if path and not any(path != p and path == p[: len(path)] for p in paths)]


def branch_logprobs(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    branches: Sequence[Branch],
    paths: Sequence[tuple[int, ...]],
    most: int,
) -> Tensor:
    """[n, ids of all branches], float32: as `RolloutEngine.branch_logprobs`, of one batch.

    tokens, mask: sequences, padded on the left, and where they are, both int64 [n, width]
    paths: `furthest_paths(branches)`
    most: rows of a batch, at most; no fewer than sequences

    The sequences run once. Behind each the paths run as a batch that continues from its keys and values, all of their
    tokens at once.
    """
    cache = DynamicCache(config=model.config) if paths else None
    behind = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=bool(paths),
        logits_to_keep=1,
    ).logits[:, -1]
    further: dict[tuple[int, ...], Tensor] = {}
    size = most // len(tokens)
    for start in range(0, len(paths), size):
        # Continuing changes the cache: only the last batch may have it itself.
        own = cache if start + size >= len(paths) else copy.deepcopy(cache)
        further |= _behind_paths(model, mask, own, paths[start : start + size], branches)
    parts = []
    for branch in branches:
        logits = further[branch.path] if branch.path else behind
        parts.append(logits.float().log_softmax(-1)[:, list(branch.ids)])
    return torch.cat(parts, dim=1)


def positions(mask: Tensor) -> Tensor:
    """Of the tokens of sequences that are padded on the left, int64 as `mask`."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def _behind_paths(
    model: PreTrainedModel,
    mask: Tensor,
    cache: DynamicCache,
    paths: Sequence[tuple[int, ...]],
    branches: Sequence[Branch],
) -> dict[tuple[int, ...], Tensor]:
    """Logits [n, vocabulary] behind each branch's path; the cache holds the sequences, and is used up."""
    count, longest = len(paths), max(map(len, paths))
    cache.batch_repeat_interleave(count)
    # Padded behind their ends, which earlier tokens do not see.
    rows = mask.new_tensor([[*path, *[0] * (longest - len(path))] for path in paths])
    depths = sorted({len(branch.path) for branch in branches if 0 < len(branch.path) <= longest})
    before = mask.repeat_interleave(count, dim=0)
    logits = model(
        input_ids=rows.repeat(len(mask), 1),
        attention_mask=torch.cat([before, before.new_ones(len(before), longest)], dim=1),
        position_ids=before.sum(1, keepdim=True) + torch.arange(longest, device=mask.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=mask.new_tensor(depths) - 1,
    ).logits.view(len(mask), count, len(depths), -1)
    return {
        branch.path: logits[:, row, depths.index(len(branch.path))]
        for branch in branches
        for row, path in enumerate(paths)
        if branch.path and path[: len(branch.path)] == branch.path
    }
