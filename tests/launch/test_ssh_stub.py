"""What examples/launch/ssh.sh tells its hosts, with a stub in place of ssh."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAVES = """#!/bin/bash
# A host whose ranks save when they are told to stop.
while IFS= read -r word; do
    echo "$word" >>words
    [ "$word" != stop ] || { echo saved >>words; exit 143; }
done
"""
NOT_READY = """#!/bin/bash
# A host that answers before its file systems are there.
case "${@: -1}" in
    *cluster.hostfile*) echo check >>words; [ -e ready ] ;;
    *) echo start >>words; exit 127 ;;
esac
"""


class Launcher:
    """`ssh.sh OPTIONS` for two hosts; `words` is what the stubs have written."""

    def __init__(self, directory: Path, stub: str, *options: str) -> None:
        (directory / "bin").mkdir()
        (directory / "bin/ssh").write_text(
            stub.replace(">>words", f">>{directory}/words").replace(" ready ", f" {directory}/ready ")
        )
        (directory / "bin/ssh").chmod(0o755)
        (directory / "hosts").write_text("n1 slots=1 address=10.0.0.1\nn2 slots=1 address=10.0.0.2\n")
        self._words = directory / "words"
        self.said = directory / "said"
        environment = os.environ | {
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(ROOT / ".venv/bin/python"),
            "RESTART_SECONDS": "0",
        }
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [
                    "env",
                    "--default-signal=INT",
                    "bash",
                    ROOT / "examples/launch/ssh.sh",
                    "--no-preflight",
                    "--logs",
                    directory / "logs",
                    *options,
                ]
                + [directory / "hosts", "train", "run.yaml"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def words(self) -> list[str]:
        return self._words.read_text().split() if self._words.exists() else []

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said.read_text()
            time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_the_launcher_lets_the_ranks_save(
    number: int, status: int, tmp_path: Path
) -> None:
    """As of a terminal that closes, or of a service that is stopped: the lines to the hosts stay until they have."""
    launcher = Launcher(tmp_path, SAVES)
    launcher.until(lambda: launcher.words().count("beat") >= 4)
    os.killpg(launcher.process.pid, number)
    assert launcher.process.wait(60) == status, launcher.said.read_text()
    assert launcher.words().count("saved") == 2


def test_a_restart_waits_until_a_host_is_ready(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, NOT_READY, "--max-restarts", "1")
    launcher.until(lambda: launcher.words().count("check") >= 2)
    assert launcher.words().count("start") == 2
    (tmp_path / "ready").touch()
    assert launcher.process.wait(60) == 1
    assert launcher.words().count("start") == 4
    assert "restart 1 of 1 in 0 s" in launcher.said.read_text() and "no restart is left" in launcher.said.read_text()
