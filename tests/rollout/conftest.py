"""Options and servers shared by the rollout tests."""

from pathlib import Path

import pytest

from tests.support.rollout_fake_server import FakeServer

ROOT = Path(__file__).parents[2]

DEFAULT_PYTHON = {name: str(ROOT / f".venv-{name}/bin/python") for name in ("sglang", "vllm")}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known when this folder is on the command line; a run of all tests takes the defaults.
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
