"""A run that is killed, wherever it is, and started again ends as the run that nobody has disturbed: bit by bit.

    KILLS=20 python -m pytest tests/training/test_kills.py -k everywhere -s

kills each phase 20 times at each number of ranks and prints the table of docs/surviving.md; half an hour. By default
each phase is killed twice by itself, and once with two ranks.
"""

import os
from pathlib import Path

import pytest

from tests.support.kills import PHASES, Run, check_left, differences, kill_often, killed_config, result_of
from tests.support.tiny_runs import write_tiny_task

KILLS = int(os.environ.get("KILLS", "0"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Runs that nobody disturbs, by their number of ranks."""
    runs = {}
    for ranks in (1, 2):
        directory = tmp_path_factory.mktemp(f"whole{ranks}")
        runs[ranks] = Run(directory, killed_config(task, directory / "out"), ranks)
        runs[ranks].finish()
    return runs


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_everywhere_it_ends_bit_identical(
    phase: str, ranks: int, task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out"), ranks)
    print("\n" + kill_often(run, whole[ranks], phase, KILLS or 3 - ranks, seed=16).row(), end=" ")


@pytest.mark.skipif(not KILLS, reason="a start for each file operation: set KILLS")
def test_killed_before_each_file_operation_it_ends_bit_identical(
    task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    """Every one, so that no moment between two of them is left to chance."""
    first = Run(tmp_path / "first", killed_config(task, tmp_path / "first/out"), 1)
    first.start(watch=True)
    operations, expected = first.report()["operations"], result_of(whole[1])
    for number, operation in enumerate(operations):
        run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out"), 1)
        end = run.start({"operation": number}, [0], watch=True)
        assert end.codes == [-9], f"{number} {operation}: {end}\n{run.log()[-3000:]}"
        check_left(run)
        run.finish()
        assert not (wrong := differences(result_of(run), expected)), f"{number} {operation}:\n" + "\n".join(wrong)
        run.forget()
    print(f"\nkilled before each of {len(operations)} file operations")
