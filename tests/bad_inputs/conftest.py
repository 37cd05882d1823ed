"""The good directory that every row is a copy of."""

from pathlib import Path

import pytest

from tests.support.bad_inputs import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("good") / "base")


@pytest.fixture(autouse=True)
def _alone(no_process_group: None) -> None:
    """A row that trains joins a world of one, which the next must not find."""
