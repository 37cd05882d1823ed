"""Fixtures of several folders."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from real_megatron.policy import parallel_groups
from tests.support.hosts import Hosts, missing


@pytest.fixture
def no_process_group() -> None:
    """End what earlier tests of the same process have joined: a world can be imagined only outside of a real one."""
    if dist.is_initialized():
        parallel_groups.end_model_groups()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts, h1 to h3, that ssh reaches."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made
