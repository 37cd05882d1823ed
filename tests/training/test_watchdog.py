"""A run that is stuck ends with the stacks of its ranks, and goes on; one that is slow does not end."""

import faulthandler
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from real_megatron import progress
from real_megatron.config import RunConfig
from real_megatron.training.watchdog import EXIT_STUCK, Watchdog, together, watching
from tests.support.ranks import run_ranks
from tests.support.stuck import hanging
from tests.support.tiny_runs import rows, tiny_config, train, weights, write_tiny_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run_ranks(2, train, config_of(task, output))
    assert not (output / "stacks").exists(), "a run that was never stuck leaves nothing"
    return output


def config_of(task: Path, output: Path, **parallel: float) -> RunConfig:
    checkpoint = {"save_hf": True, "every": 1}
    return tiny_config(task, output, checkpoint=checkpoint, parallel=parallel)


def test_the_stacks_of_all_ranks_are_in_one_file_and_the_run_goes_on(task: Path, tmp_path: Path, whole: Path) -> None:
    """Two ranks, of which one sleeps in the second step: bit by bit the run that was not stuck."""
    config = config_of(task, tmp_path, stuck_minutes=0.05)
    with pytest.raises(RuntimeError) as error:
        run_ranks(2, hanging, config, 2, 1)
    assert str(error.value).count("the worker died (exit code 1)") == 2
    (file,) = (tmp_path / "stacks").glob("*.txt")
    text = file.read_text()
    first, second = text.split("===== rank ")[1:]
    assert first.startswith("0\n") and second.startswith("1\n") and "sleep_in_the_step" not in first
    assert "in sleep_in_the_step" in second and "in train_step" in second
    assert "all_gather" in first or "all_reduce" in first or "finalize_model_grads" in first
    for line in text.splitlines()[:2]:  # "rank 0, process 123 on host"
        assert not Path(f"/proc/{line.split()[3]}").exists()
    run_ranks(2, train, config_of(task, tmp_path))
    assert weights(tmp_path) == weights(whole) and rows(tmp_path) == rows(whole)


def test_a_rank_that_holds_the_interpreter_lock_writes_its_own(task: Path, tmp_path: Path) -> None:
    """No thread of Python gets a turn there."""
    with pytest.raises(RuntimeError, match="the worker died"):
        run_ranks(1, hanging, config_of(task, tmp_path, stuck_minutes=0.05), 2, 0, True)
    (file,) = (tmp_path / "stacks").glob("*/rank-00000.txt")
    assert "Timeout (" in file.read_text() and "in sleep_in_the_step" in file.read_text()


@pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="six processes import Megatron-Core: set LONG_TESTS=1")
def test_under_torchrun_the_run_is_started_again(task: Path, tmp_path: Path, whole: Path) -> None:
    config = config_of(task, tmp_path / "run", stuck_minutes=0.05)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--monitor-interval=0.2"]
    command += ["-m", "tests.support.stuck", str(tmp_path / "run.yaml"), "2", "0"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
        # torch 2.13 gives the next start of gloo ranks the addresses of the last one, where the agents share a store.
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("no rank has made progress for 0.05 minutes") == 1
    assert "the stacks of 2 of 2 ranks are in" in done.stderr
    assert weights(tmp_path / "run") == weights(whole)
    (file,) = (tmp_path / "run/stacks").glob("*.txt")
    assert "sleep_in_the_step" in file.read_text()


# --- without a run ----------------------------------------------------------------------------------------------------


def test_progress_of_any_rank_keeps_all_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own, or that of another: that one touches the file."""
    ended: list[bool] = []
    monkeypatch.setattr(Watchdog, "_end", lambda dog, asked: ended.append(asked))
    (tmp_path / "progress").touch()
    dog = Watchdog(tmp_path, limit=1.0, rank=0, world=2)
    for i in range(24):
        time.sleep(0.1)
        progress.mark() if i < 8 else os.utime(tmp_path / "progress")
    assert not ended
    time.sleep(1.5)
    assert ended and ended[0]
    dog.close()


def test_a_request_of_another_rank_ends_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(Watchdog, "_end", lambda dog, asked: ended.append(asked))
    (tmp_path / "progress").touch()
    dog = Watchdog(tmp_path, limit=4.0, rank=0, world=2)
    (tmp_path / "request").touch()
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    dog.close()
    assert ended and not ended[0]


def test_a_log_that_takes_no_more_does_not_keep_a_stuck_rank_alive(tmp_path: Path) -> None:
    """As a pipe whose reader hangs: the thread that writes to it holds the lock of the log."""
    (tmp_path / "progress").touch()
    code = """if True:
        import logging, sys, time
        from pathlib import Path
        from real_megatron.training import watchdog
        logging.basicConfig()
        watchdog.GRACE_S = watchdog._MARGIN_S = 0.2
        dog = watchdog.Watchdog(Path(sys.argv[1]), limit=0.5, rank=0, world=1)
        logging.getLogger().handlers[0].acquire()
        time.sleep(10_000)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=False)
    assert done.returncode == EXIT_STUCK
    assert "===== rank 0" in tmp_path.with_suffix(".txt").read_text()


def test_a_directory_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watchdog, "_end", lambda dog, asked: pytest.fail("ended"))
    place = tmp_path / "stacks/start"
    dog = Watchdog(place, limit=1.0, rank=0, world=1)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    for _ in range(15):
        time.sleep(0.1)
        progress.mark()
    dog.close()
    assert dog._closed.is_set() and not dog._thread.is_alive()


def test_what_killed_starts_have_left_goes_and_stacks_stay(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    for name in ("old", "stuck"):
        (stacks / name).mkdir(parents=True)
        (stacks / name / "rank-00000.txt").touch()
    (stacks / "stuck/request").touch()
    with watching(tmp_path, 1.0):
        assert not (stacks / "old").exists() and len(list(stacks.iterdir())) == 2
    assert [path.name for path in stacks.iterdir()] == ["stuck"]
    with watching(tmp_path / "off", 0):
        assert not (tmp_path / "off").exists()
    faulthandler.cancel_dump_traceback_later()


def test_equal_stacks_are_shown_once() -> None:
    def text(rank: int, where: str, thread: str) -> str:
        return f"rank {rank}, process {rank} on host\nThread {thread}:\n  File {where}\n-- end of rank {rank}\n"

    shown = together([text(0, "a", "0xab1"), text(1, "b", "0xab2"), None, text(3, "a", "0xab3")])
    assert shown.count("File a") == 1 and "===== ranks 0, 3" in shown and "===== rank 1\n" in shown
    assert "rank 2 has written none" in shown and "rank 3, process 3 on host" in shown
