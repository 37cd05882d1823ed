"""The lock on an output: one owner, who loses it with its life and not before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from real_megatron.errors import ConfigError
from real_megatron.locks import only_writer


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_writer_is_refused_and_the_lock_leaves_nothing(inside: bool, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with only_writer(output, inside=inside):
        for _ in range(2):  # a refusal takes the lock from nobody
            message = rf"^{output} is being written by another job \(process {os.getpid()} on .+\): wait until it has"
            with pytest.raises(ConfigError, match=message), only_writer(output, inside=inside):
                raise AssertionError("two writers")
        with only_writer(tmp_path / "new" / "other", inside=inside):
            pass
    with pytest.raises(KeyError), only_writer(output, inside=inside):
        raise KeyError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_is_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with only_writer(tmp_path / "file"), pytest.raises(ConfigError), only_writer(tmp_path / "link"):
        raise AssertionError("two writers")


HOLD = """
import os, sys, time
from real_megatron.locks import only_writer
with only_writer(sys.argv[1]):
    if os.fork() == 0:  # lives on: it may not hold the lock for its parent
        print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_dies_with_its_process_and_not_with_or_after_its_children(tmp_path: Path) -> None:
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"\(process {holder.pid} on "), only_writer(output):
            raise AssertionError("two writers")
        holder.kill()
        holder.wait()
        with only_writer(output):
            pass
        assert list(tmp_path.iterdir()) == []
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_file_that_its_holder_removed_meanwhile_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock: who locks the removed file would own it beside the next one."""
    lock, flock, calls = tmp_path / ".out.lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_writer(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(ConfigError), only_writer(tmp_path / "out"):
            raise AssertionError("two writers")
        lock.unlink()
        lock.write_text("somebody else's")
    assert lock.exists()


def test_a_file_system_without_locks_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path / "out"), only_writer(tmp_path / "out"):
        assert "its file system has no locks" in caplog.text

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), only_writer(tmp_path / "out"):
        pass
