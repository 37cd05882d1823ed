"""A run that stops and resumes is the run that did not stop."""

from pathlib import Path

import pytest

from real_megatron.sections import ConfigError
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import rows, tiny_config, train, train_until, weights, write_tiny_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run_ranks(1, train, tiny_config(task, output, checkpoint={"save_hf": True}))
    return output


@pytest.mark.parametrize("objective", [{}, {"kl": 0.1}], ids=["plain", "kl"])
def test_resumed_at_the_same_layout_it_is_bit_identical(
    objective: dict[str, float], task: Path, whole: Path, tmp_path: Path
) -> None:
    changes = {"objective": objective, "checkpoint": {"save_hf": True}}
    if objective:
        whole = tmp_path / "whole"
        run_ranks(1, train, tiny_config(task, whole, **changes))
    config = tiny_config(task, tmp_path / "cut", **changes)
    run_ranks(1, train_until, config, 1)
    assert len(rows(config.output)) == 1
    run_ranks(1, train, config)
    assert rows(config.output) == rows(whole)
    assert weights(config.output) == weights(whole)


def test_resumed_at_another_layout_it_goes_on_alike(task: Path, whole: Path, tmp_path: Path) -> None:
    run_ranks(1, train_until, tiny_config(task, tmp_path), 2)
    run_ranks(4, train, tiny_config(task, tmp_path, parallel={"tensor": 2}))
    for resumed, expected in zip(rows(tmp_path), rows(whole), strict=True):
        assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert resumed["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_another_run_is_not_resumed_and_a_finished_one_is_left_alone(task: Path, whole: Path) -> None:
    with pytest.raises(RuntimeError, match="belongs to another run") as error:
        run_ranks(1, train, tiny_config(task, whole, objective={"beta": 0.5}))
    assert ConfigError.__name__ in str(error.value) and "objective.beta: 1.0 in the checkpoint, 0.5 now" in str(
        error.value
    )
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    run_ranks(1, train, tiny_config(task, whole, checkpoint={"save_hf": True}))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
