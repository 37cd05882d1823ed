"""Fixtures of several folders."""

import pytest
import torch.distributed as dist

from real_megatron.policy import parallel_groups


@pytest.fixture
def no_process_group() -> None:
    """End what earlier tests of the same process have joined: a world can be imagined only outside of a real one."""
    if dist.is_initialized():
        parallel_groups.end_model_groups()
        dist.destroy_process_group()
