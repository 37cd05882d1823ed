"""Options and servers shared by the rollout tests."""

from pathlib import Path

import pytest

from tests.support.rollout_fake_server import FakeServer

ROOT = Path(__file__).parents[2]


DEFAULT_PYTHON = str(ROOT / ".venv-sglang/bin/python")


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known when this folder is on the command line; a run of all tests takes the default.
    parser.addoption(
        "--sglang-python", default=DEFAULT_PYTHON, help="Python of the environment of tools/install_sglang_cpu.sh"
    )


@pytest.fixture(scope="session")
def sglang_python(request: pytest.FixtureRequest) -> str:
    path = request.config.getoption("--sglang-python", DEFAULT_PYTHON)
    if not Path(path).exists():
        pytest.fail(f"no SGLang at {path}: run tools/install_sglang_cpu.sh, or pass --sglang-python")
    return path


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
