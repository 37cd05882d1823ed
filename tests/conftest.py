"""Fixtures of several folders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from real_megatron.policy import parallel_groups
from tests.support import command_line
from tests.support.hosts import Hosts, missing


@pytest.fixture
def no_process_group() -> None:
    """End what earlier tests of the same process have joined: a world can be imagined only outside of a real one."""
    if dist.is_initialized():
        parallel_groups.end_model_groups()
        dist.destroy_process_group()


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Keep what a command sets up of logging to its own test."""
    with command_line.own_logging():
        yield


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts, h1 to h3, that ssh reaches."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


ROOT = Path(__file__).parents[1]

DEFAULT_PYTHON = {name: str(ROOT / f".venv-{name}/bin/python") for name in ("sglang", "vllm")}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known when this folder or one in it is on the command line.
    for name, default in DEFAULT_PYTHON.items():
        script = f"tools/install_{name}_cpu.sh"
        parser.addoption(f"--{name}-python", default=default, help=f"Python of the environment of {script}")


def _python(request: pytest.FixtureRequest, name: str) -> str:
    path = request.config.getoption(f"--{name}-python", DEFAULT_PYTHON[name])
    if not Path(path).exists():
        pytest.fail(f"no {name} at {path}: run tools/install_{name}_cpu.sh, or pass --{name}-python")
    return path


@pytest.fixture(scope="session")
def sglang_python(request: pytest.FixtureRequest) -> str:
    return _python(request, "sglang")


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> str:
    return _python(request, "vllm")
