"""What came of a prompt as training takes it, and how that travels from the rank that sampled it to the others."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from real_megatron.batch.types import Trajectory

_REASONS = ("stop", "length", "eos")


@dataclass
class Counts:
    """What happened to the responses of a prompt."""

    no_anchor: int = 0
    truncated: int = 0
    split_anchor: int = 0
    forced: int = 0
    dropped: int = 0
    off_scale: int = 0
    tokens: int = 0
    """Of all responses, as the engine returned them."""
    longest: int = 0
    """Tokens of the longest one."""


@dataclass
class SampledGroup:
    """The trajectories of a prompt, without those that were dropped."""

    trajectories: list[Trajectory] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def encode(groups: Sequence[SampledGroup]) -> Tensor:
    """The groups as one message, uint8 [bytes], which `decode` reads. Log-probs have to be float32 numbers.

    In this order: the number of groups; a row of int64 for each (trajectories, `Counts`); a row of int64 for each
    trajectory (tokens, answer index or -1, weight version, finish reason, forced anchor); of all trajectories one
    behind the other the token ids (int32), log-probs (float32) and loss masks (a byte each).
    """
    trajectories = [t for group in groups for t in group.trajectories]
    parts = [
        np.array([len(groups)], np.int64),
        np.array([(len(group.trajectories), *astuple(group.counts)) for group in groups], np.int64),
        np.array([_row(t) for t in trajectories], np.int64),
        _joined([t.response_ids for t in trajectories], np.int32),
        _joined([t.old_logprobs or [] for t in trajectories], np.float32),
        _joined([t.loss_mask for t in trajectories], np.bool_),
    ]
    return torch.frombuffer(bytearray().join(part.tobytes() for part in parts), dtype=torch.uint8)


def decode(message: Tensor) -> list[SampledGroup]:
    """The groups that `encode` has made the message of."""
    data, offset = message.numpy().data, 0

    def take(dtype: type[np.generic], count: int) -> np.ndarray:
        nonlocal offset
        values = np.frombuffer(data, dtype, count, offset)
        offset += values.nbytes
        return values

    (count,) = take(np.int64, 1).tolist()
    columns = 1 + len(fields(Counts))
    heads = take(np.int64, count * columns).reshape(count, columns).tolist()
    rows = take(np.int64, 5 * sum(size for size, *_ in heads)).reshape(-1, 5).tolist()
    total = sum(length for length, *_ in rows)
    ids, logprobs, masks = (take(dtype, total).tolist() for dtype in (np.int32, np.float32, np.bool_))
    trajectories, start = [], 0
    for length, answer, version, reason, forced in rows:
        own = slice(start, start + length)
        start += length
        trajectories.append(
            Trajectory(
                response_ids=ids[own],
                answer_index=None if answer < 0 else answer,
                loss_mask=masks[own],
                old_logprobs=logprobs[own],
                finish_reason=_REASONS[reason],
                forced_anchor=bool(forced),
                weight_version=version,
            )
        )
    following = iter(trajectories)
    return [SampledGroup([next(following) for _ in range(size)], Counts(*counts)) for size, *counts in heads]


def _row(t: Trajectory) -> tuple[int, ...]:
    answer = -1 if t.answer_index is None else t.answer_index
    return len(t.response_ids), answer, t.weight_version, _REASONS.index(t.finish_reason), t.forced_anchor


def _joined(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    """The lists one behind the other; one after another as arrays, so that no list of everything is made."""
    return np.concatenate([np.zeros(0, dtype), *(np.array(values, dtype) for values in lists)])
