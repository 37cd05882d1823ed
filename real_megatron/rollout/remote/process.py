"""A server as a child process: start, log, end."""

import logging
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from real_megatron.errors import EngineError

logger = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 2000
_GRACE_S = 10

# Variables that torchrun sets for its workers. A server would read them as its own: with TORCHELASTIC_USE_AGENT_STORE
# it waits for a store that does not exist.
_TORCHRUN_VARIABLES = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|GROUP|ROLE)_.*")

LAUNCHER = Path(__file__).parent / "launcher" / "launch.py"
"""Runs a module in the server's environment and ends it with this process."""

LAUNCHER_KEY = "LAUNCH_API_KEY"
"""Environment variable from which the launcher takes the API key of a server that reads none from its own."""


# A socket's path has at most 107 bytes. Servers name theirs in TMPDIR, at the longest (vLLM) a slash and a UUID.
_TMPDIR_BYTES = 107 - 37


def tmpdir_too_long() -> str:
    """Why servers could not make their sockets in TMPDIR; empty if they can."""
    scratch = tempfile.gettempdir()
    length = len(os.fsencode(scratch))
    if length <= _TMPDIR_BYTES:
        return ""
    return (
        f"TMPDIR has {length} bytes ({scratch}), too many for the sockets that rollout servers make in it: set TMPDIR "
        f"to a directory with a path of at most {_TMPDIR_BYTES}, such as /tmp"
    )


class ServerProcess:
    """Runs one command in a process group of its own; output goes to a log file, one file per start, never
    over an older one.

    The child's standard input stays open as long as this process lives: a launcher that watches it can end itself.
    """

    def __init__(
        self, command: Sequence[str], log_dir: Path, name: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """environment: variables in addition to those of this process; those of torchrun are left out"""
        self.command = list(command)
        self._environment = dict(environment or {})
        self.log: Path | None = None
        self.starts = 0
        self._log_dir = log_dir
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Start, or replace what runs: a server that is replaced has nothing to save. Does nothing after `close`."""
        with self._changing:
            if not self._closed:
                self._stop(grace_s=0)
                self._start()

    def _start(self) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        used = {path.name for path in self._log_dir.iterdir()}
        self.log = next(p for i in count() if (p := self._log_dir / f"{self._name}.{i}.log").name not in used)
        self.starts += 1
        inherited = {k: v for k, v in os.environ.items() if not _TORCHRUN_VARIABLES.fullmatch(k)}
        # A server that sets its title would overwrite the environment, by whose mark a launcher finds it.
        inherited["SPT_NOENV"] = "1"
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=inherited | self._environment,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self._name}: {self.command[0]} (rollout.python): {error.strerror}"
                ) from error
        logger.info("%s: process %d, log %s", self._name, self._process.pid, self.log)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        process = self._process  # another thread may be replacing it
        return process is not None and process.poll() is None

    def describe_end(self) -> str:
        """Exit status and the last lines of the log, for an error message."""
        status = "never started" if self._process is None else f"exit status {self._process.poll()}"
        tail = ""
        if self.log is not None and self.log.exists():
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                tail = log.read().decode(errors="replace")
        return f"{self._name}: {status}; log {self.log}:\n{tail}"

    def kill(self) -> None:
        """End the whole process group at once."""
        with self._changing:
            self._stop(grace_s=0)

    def close(self) -> None:
        """End the whole process group for good: SIGTERM, then SIGKILL."""
        with self._changing:
            self._closed = True
            self._stop(_GRACE_S)

    def _stop(self, grace_s: float) -> None:
        process = self._process
        if process is None:
            return
        if grace_s:
            _signal_group(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        # The group outlives its leader while a worker hangs.
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self._process = None


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
