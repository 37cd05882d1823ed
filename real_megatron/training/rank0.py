"""What one rank does for all: looking at files, writing them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(action: Callable[[], T]) -> T:
    """The result of an action that rank 0 does; its error ends the other ranks too. Collective."""
    if not dist.is_initialized():
        return action()
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as failure:
            error = failure
            outcome[1] = f"{type(failure).__name__}: {failure}"
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]
