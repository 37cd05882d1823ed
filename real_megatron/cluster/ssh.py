"""A conversation with a host over ssh: questions and answers are lines of JSON (`host_side`).

    python -m real_megatron.cluster.ssh SILENCE_SECONDS

prints the command of ssh without a host, each word followed by a NUL, for examples/launch/ssh.sh.
"""

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from real_megatron.cluster.hostfile import Host
from real_megatron.errors import ConfigError, UserError

CONNECT_S = 10
"""How long a host may take to accept a connection; a ConnectTimeout in SSH_OPTIONS comes first."""
START_S = 60
"""How long ssh and Python may take to start there."""
SILENCE_S = 20
"""A host that does not answer for three quarters of it is lost."""
BEAT_S = 2
"""Between signs of life to the other side, which ends itself without any (`host_side.SILENCE_S`)."""


class HostError(UserError):
    """A host that cannot be talked to; the message says why, without its name."""


def ssh_words(options: Sequence[str], silence_s: int) -> list[str]:
    """The command up to the host and its own options. Of an option that is given twice ssh takes the first. Raises
    ConfigError for an SSH_OPTIONS with a quote that does not end."""
    try:
        own = shlex.split(os.environ.get("SSH_OPTIONS", ""))
    except ValueError as error:
        raise ConfigError(f"SSH_OPTIONS in the environment: {error}; write it as for a shell") from None
    return [
        # A connection that is shared notices a lost host when its first user does, perhaps never.
        *("ssh", "-o", "ControlMaster=no", "-o", "ControlPath=none", *options, *own),
        *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"),
        *("-o", f"ServerAliveInterval={max(1, silence_s // 4)}", "-o", "ServerAliveCountMax=3"),
    ]


def ssh_command(host: Host, options: Sequence[str]) -> list[str]:
    """The command to which a remote command is added. It never asks for a password.

    options: further ones of ssh, which win; those of the environment variable SSH_OPTIONS come next
    """
    command = ssh_words(options, SILENCE_S)
    if host.port is not None:
        command += ["-p", str(host.port)]
    if host.user:
        command += ["-l", host.user]
    return [*command, host.name]


class Conversation:
    """`host_side` on a host, until it is closed.

    remote: the command that runs it there
    """

    def __init__(self, host: Host, options: Sequence[str], remote: str) -> None:
        """Raises HostError where the host does not answer."""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            [*ssh_command(host, options), remote],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a Ctrl-C is this process's to answer
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._complaints = threading.Thread(target=self._read_errors, daemon=True)
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        self._reader.start()
        self._complaints.start()
        try:
            self._answer(START_S)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, timeout_s: float = 60, **arguments: Any) -> Any:
        """The answer to a question. Raises HostError where there is none in time, or it is an error."""
        try:
            self._send(json.dumps({"ask": what, **arguments}))
        except (OSError, ValueError):  # the latter where `close` came first
            raise HostError(self._end()) from None
        answer = self._answer(timeout_s)
        if "error" in answer:
            raise HostError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the other side with its input, and ssh where that is not enough."""
        self._closed.set()
        with suppress(OSError), self._writing:
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _beat(self) -> None:
        with suppress(OSError, ValueError):
            while not self._closed.wait(BEAT_S):
                self._send("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise HostError(f"no answer within {timeout_s:g} s") from None
        if line is None:
            raise HostError(self._end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> str:
        """How ssh has ended: its own errors have status 255."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self._complaints.join(2)
        last = self._errors[-1] if self._errors else "without a word"
        if self._process.returncode == 255:
            return last
        return f"its Python has ended with status {self._process.returncode}: {last}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # a greeting of the host's shell is none of ours
                self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._errors.append(line.strip())


def main(arguments: Sequence[str]) -> int:
    """Print the command; returns the exit status."""
    try:
        if not arguments[0].isdecimal():
            raise ConfigError(f"SILENCE_SECONDS={arguments[0]} in the environment is no whole number of seconds")
        words = ssh_words([], int(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.stdout.write("".join(f"{word}\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
