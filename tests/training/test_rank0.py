"""What rank 0 finds, or fails at, is every rank's."""

import torch.distributed as dist

from real_megatron.training.rank0 import from_rank_0
from tests.support.ranks import run_ranks


def found() -> list[int]:
    return from_rank_0(lambda: [dist.get_rank(), 7])


def failed() -> str:
    def fail() -> None:
        raise OSError("disk full")

    try:
        from_rank_0(fail)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_all_ranks_get_what_rank_0_found() -> None:
    assert from_rank_0(lambda: 3) == 3
    assert run_ranks(2, found) == [[0, 7], [0, 7]]


def test_an_error_of_rank_0_ends_all() -> None:
    assert run_ranks(2, failed) == ["OSError: disk full", "RuntimeError: rank 0 failed: OSError: disk full"]
