"""A run that is killed, wherever it is, and started again ends as the run that nobody has disturbed: bit by bit.

    KILLS=20 python -m pytest tests/training/test_kills.py -k everywhere -s

kills each phase 20 times at each number of ranks and prints the table of docs/surviving.md; half an hour. By default
one run of each number of ranks is killed once in every phase on its way.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from real_megatron.config import ParallelConfig
from tests.support import rollout_fake_server
from tests.support.kill_chains import kill_often
from tests.support.kill_points import PHASES
from tests.support.kills import Run, check_left, differences, killed_config, result_of
from tests.support.tiny_runs import rows, write_tiny_task

KILLS = int(os.environ.get("KILLS", "0"))
SECTIONS: dict[int, dict[str, Any]] = {1: {}, 2: {"checkpoint": {"asynchronous": True}}}
"""By the number of ranks: with two, checkpoints are written while training goes on."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Runs that nobody disturbs, by their number of ranks."""
    runs = {}
    for ranks in (1, 2):
        directory = tmp_path_factory.mktemp(f"whole{ranks}")
        runs[ranks] = Run(directory, killed_config(task, directory / "out", **SECTIONS[ranks]), ranks)
        runs[ranks].finish()
    return runs


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_once_in_each_phase_it_ends_bit_identical(
    ranks: int, task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out", **SECTIONS[ranks]), ranks)
    assert kill_often(run, whole[ranks], PHASES, seed=16, chain=len(PHASES)).kills == len(PHASES)


@pytest.mark.skipif(not KILLS, reason="half an hour: set KILLS")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_everywhere_it_ends_bit_identical(
    phase: str, ranks: int, task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out", **SECTIONS[ranks]), ranks)
    print("\n" + kill_often(run, whole[ranks], [phase] * KILLS, seed=16).row(), end=" ")


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


def test_killed_between_a_save_and_the_removal_behind_it_the_next_start_removes(
    task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    """At the last save too, where no other comes."""
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out"), 1)
    assert run.start({"phase": "export"}, [0]).codes == [-9]
    checkpoints = run.output / "checkpoints"
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-000001")
    run.finish()
    assert not (wrong := differences(result_of(run), result_of(whole[1]))), "\n".join(wrong)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_writer_of_tensors_that_is_killed_alone_ends_the_run_which_goes_on(
    asynchronous: bool, task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    """As by the kernel, where memory is short: the run ends, with both ranks."""
    config = killed_config(task, tmp_path / "run/out", **SECTIONS[2])
    first = killed_config(task, tmp_path / "run/out", checkpoint={"asynchronous": asynchronous})
    run = Run(tmp_path / "run", first.model_copy(update={"parallel": ParallelConfig(stuck_minutes=1)}), 2)
    run.setup = "tests.support.kill_points:kill_writers"
    end = run.start()
    assert 0 not in end.codes and not end.ended_by_agent and not end.left, f"{end}\n{run.log()[-6000:]}"
    assert "a process that writes the checkpoint was killed by SIGKILL" in run.log()
    assert check_left(run) == 0
    run.config, run.setup = config, ""
    run.finish()
    assert not (wrong := differences(result_of(run), result_of(whole[2]))), "\n".join(wrong)


WRITERS = ("samples", "save", "evaluate", "row", "export")
"""The phases that write files into the output."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for two of the runs here."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def said(run: Run) -> list[str]:
    """The error lines of the run; fails on a traceback."""
    log = run.log()
    if "Traceback" in log:
        pytest.fail(log[-3000:])
    return [line for line in log.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("phase", WRITERS)
def test_a_disk_that_is_full_is_named_and_the_run_goes_on(
    phase: str, task: Path, whole: dict[int, Run], small_disk: Path, tmp_path: Path
) -> None:
    """Bit by bit, once there is room."""
    run = Run(tmp_path / "run", killed_config(task, small_disk / "out"), 1)
    end = run.start({"phase": phase, "occurrence": 0 if phase == "export" else 1, "act": f"fill {small_disk}"}, [0])
    (error,) = said(run)
    assert end.codes == [1] and not end.left
    assert f"{small_disk}/out" in error and "cannot be written" in error, error
    assert "make room there, and run the same command again to go on" in error, error
    check_left(run)
    (small_disk / "filler").unlink()
    run.finish()
    assert not (wrong := differences(result_of(run), result_of(whole[1]))), "\n".join(wrong)


@pytest.mark.parametrize("phase, act", [*((phase, "move") for phase in WRITERS), ("row", "remove")])
def test_an_output_that_vanishes_ends_the_run_at_its_next_write(
    phase: str, act: str, task: Path, whole: dict[int, Run], tmp_path: Path
) -> None:
    """And nothing is written to another place of that name."""
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "place/out"), 1)
    occurrence = 0 if phase == "export" else 1
    end = run.start({"phase": phase, "occurrence": occurrence, "act": f"{act} {run.output}"}, [0])
    (error,) = said(run)
    assert end.codes == [1] and not end.left and not run.output.exists()
    assert f"{run.output}" in error and "removed or renamed" in error, error
    if act == "move":
        (tmp_path / "place/out.away").rename(run.output)
        check_left(run)
    run.finish()
    assert not (wrong := differences(result_of(run), result_of(whole[1]))), "\n".join(wrong)


def test_killed_while_it_generates_one_step_ahead_it_does_each_step_once(task: Path, tmp_path: Path) -> None:
    """Not bit by bit: the first batch behind a start comes from the newest weights (`OneStepOff`)."""
    sections = {"rollout": {"staleness": 1}, "objective": {"ratio": "truncated_is"}}
    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out", **sections), 1)
    for phase in ("rollout", "update", "sync"):
        assert run.start({"phase": phase, "occurrence": 1, "after": 0.01}, [0]).codes == [-9]
        check_left(run)
    run.finish()
    found = result_of(run)
    assert [row["step"] for row in found["metrics.jsonl"]] == [0, 1, 2, 3]
    steps = [json.loads(line)["step"] for line in found["samples.jsonl"].splitlines()]
    assert steps == sorted(steps) and len(steps) == 3 * steps.count(1)
    assert not [name for name in found["files"] if ".partial" in name or name.endswith((".tmp", ".lock"))]


def test_a_server_whose_trainer_was_killed_in_a_sync_serves_the_next(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server, left with a part of the weights, stopped and in the middle of an update, outlives the trainer."""
    monkeypatch.setattr(rollout_fake_server, "VOCABULARY", 21)  # the tiny judge's
    with rollout_fake_server.FakeServer() as server:
        rollout = {"engine": "sglang", "servers": [server.url], "weight_sync": "tensor"}
        run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out", steps=1, rollout=rollout), 1)
        run.environment["TMPDIR"] = tempfile.gettempdir()  # for a socket, whose path may not be long
        assert run.start({"phase": "send", "occurrence": 2}, [0]).codes == [-9]
        assert check_left(run) == 0
        killed, calls = server.version, len(server.calls)
        assert killed.endswith("-0-incomplete") and server.paused and server.session_open
        run.finish()
        assert not server.paused and not server.session_open
    said = [body["new_version"] for path, body in server.calls[calls:] if path == "/update_weight_version"]
    name = said[0].split("-")[0]
    assert said == [f"{name}-{label}" for label in ("0-incomplete", "0", "1-incomplete", "1")]
    assert not killed.startswith(name)
    assert [row["step"] for row in rows(run.output)] == [0, 1]
