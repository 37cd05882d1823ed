"""Servers shared by the rollout tests."""

import pytest

from tests.support.rollout_fake_server import FakeServer


@pytest.fixture
def servers():
    """Start fake servers: `servers(2)`, `servers(1, "vllm")`."""
    started: list[FakeServer] = []

    def start(count: int, flavour: str = "sglang") -> list[FakeServer]:
        new = [FakeServer(flavour).__enter__() for _ in range(count)]
        started.extend(new)
        return new

    yield start
    for server in started:
        server.__exit__()
