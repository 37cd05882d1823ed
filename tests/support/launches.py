"""Launches of small runs on several hosts (tests/support/hosts.py) by examples/launch/ssh.sh."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from real_megatron.config import RunConfig
from tests.support.hosts import Hosts

ROOT = Path(__file__).parents[2]
# Ranks and servers start on a machine that may be busy: only a hang takes so long.
DEADLINE_S = 600


class Launch:
    """`ssh.sh OPTIONS HOSTFILE train CONFIG`, running; a context manager that ends it."""

    def __init__(self, hosts: Hosts, hostfile: Path, config: RunConfig, directory: Path, *options: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.logs = directory / "logs"
        self.hosts = hosts
        (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        self.output = config.output
        self.log = directory / "launch.log"
        arguments = [*options, "--logs", str(self.logs), str(hostfile), "train", str(directory / "config.yaml")]
        environment = os.environ | {
            "SSH_OPTIONS": f"-F {hosts.directory / 'ssh_config'}",
            "OMP_NUM_THREADS": "1",
            "STOP_SECONDS": "20",
            "SILENCE_SECONDS": "8",
            "RESTART_SECONDS": "0",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                # A shell cannot trap a signal that its parent ignores, as one does that was started in the background.
                ["env", "--default-signal=INT", "bash", str(ROOT / "examples/launch/ssh.sh"), *arguments],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(DEADLINE_S)

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something; fails where the launch ends first."""
        deadline = time.monotonic() + DEADLINE_S
        while not happened():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def steps(self) -> int:
        """The steps whose rows stand in metrics.jsonl."""
        file = self.output / "metrics.jsonl"
        return sum(json.loads(line)["step"] > 0 for line in file.read_text().splitlines()) if file.exists() else 0

    def left(self) -> dict[int, str]:
        """What runs on the hosts."""
        return {pid: text for host in self.hosts.names for pid, text in self.hosts.processes(host).items()}

    def nothing_left_within(self, seconds: float, of: Collection[int] = ()) -> float:
        """How long it took until nothing ran on any host, or none of the processes `of`; fails after `seconds`."""
        begin = time.monotonic()
        while left := {pid: text for pid, text in self.left().items() if not of or pid in of}:
            assert time.monotonic() - begin < seconds, left
            time.sleep(0.1)
        return time.monotonic() - begin

    def text(self) -> str:
        """What the launcher has said, and the logs of the hosts."""
        files = [self.log, *sorted(self.logs.glob("*/*.log"))]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-4000:]}" for file in files if file.exists())
