"""A run of two hosts with a gloo rank each, started by examples/launch/ssh.sh: to its end, through a lost host, and
ended by Ctrl-C and by the death of the launcher."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from real_megatron.config import RunConfig
from tests.support.hosts import Hosts, missing
from tests.support.launches import Launch
from tests.support.tiny_runs import rows, tiny_config, write_tiny_task

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

STEPS = 30


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def hostfile(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hosts.write(tmp_path_factory.mktemp("hostfile") / "hosts", "h1 slots=1", "h2 slots=1")


def config_of(task: Path, output: Path) -> RunConfig:
    return tiny_config(task, output, steps=STEPS, checkpoint={"every": 5, "save_hf": True})


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts, hostfile: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with Launch(hosts, hostfile, config_of(task, directory / "run"), directory, "--no-preflight") as launch:
        assert launch.wait() == 0, launch.text()
        launch.nothing_left_within(5)
        yield launch


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "hf" / "model.safetensors")


@pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="four starts of two ranks: set LONG_TESTS=1")
def test_a_run_that_loses_a_rank_and_a_host_ends_as_an_undisturbed_one(
    hosts: Hosts, hostfile: Path, task: Path, undisturbed: Launch, tmp_path: Path
) -> None:
    options = ("--no-preflight", "--max-restarts", "2")
    with Launch(hosts, hostfile, config_of(task, tmp_path / "run"), tmp_path, *options) as launch:
        launch.until(lambda: launch.steps() >= 6)
        ranks = [pid for pid, text in hosts.processes("h2").items() if "-m real_megatron train" in text]
        before = launch.left()
        os.kill(random.choice(ranks), signal.SIGKILL)
        launch.nothing_left_within(30, before)
        launch.until(lambda: "start 1 " in launch.log.read_text() and launch.steps() >= 12)
        hosts.cut("h2")
        try:
            launch.until(lambda: not hosts.processes("h2"))  # by itself: nobody reaches it
            launch.until(lambda: "when all hosts answer" in launch.log.read_text())
            assert launch.steps() < STEPS
        finally:
            hosts.join("h2")
        assert launch.wait() == 0, launch.text()
        launch.nothing_left_within(5)
        assert "resumed from" in launch.text()
    assert rows(tmp_path / "run") == rows(undisturbed.output)
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed.output)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="40 s; test_ssh_stub.py has its core: LONG_TESTS=1")
def test_ctrl_c_saves_and_ends_all_hosts(hosts: Hosts, hostfile: Path, task: Path, tmp_path: Path) -> None:
    config = config_of(task, tmp_path / "run")
    config.steps = 1000
    config.checkpoint.every = 0
    with Launch(hosts, hostfile, config, tmp_path, "--no-preflight") as launch:
        launch.until(lambda: launch.steps() >= 1)
        os.kill(launch.process.pid, signal.SIGINT)
        assert launch.process.wait(30) == 130, launch.text()
        launch.nothing_left_within(2)
    assert list((tmp_path / "run/checkpoints").glob("step-*[0-9]"))


def test_hosts_end_when_the_launcher_is_killed(hosts: Hosts, hostfile: Path, task: Path, tmp_path: Path) -> None:
    config = config_of(task, tmp_path / "run")
    config.steps = 1000
    with Launch(hosts, hostfile, config, tmp_path, "--no-preflight") as launch:
        launch.until(
            lambda: all("torch.distributed.run" in " ".join(hosts.processes(h).values()) for h in ("h1", "h2"))
        )
        # A line that pauses has not ended.
        os.killpg(launch.process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.killpg(launch.process.pid, signal.SIGCONT)
        time.sleep(1)
        assert all("torch.distributed.run" in " ".join(hosts.processes(h).values()) for h in ("h1", "h2")), (
            launch.text()
        )
        launch.process.kill()
        launch.process.wait()
        launch.nothing_left_within(30)
