"""What a host answers to a preflight: `python -m real_megatron.cluster.host_side` reads questions from its standard
input and prints answers, a line of JSON each, until the input ends. Imports nothing that is slow.

Whoever asks sends empty lines while it waits. When the input ends or is silent for `SILENCE_S`, the asker has died or
the network has: what was started here is killed, and this process ends.
"""

import errno
import hashlib
import json
import os
import platform
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from real_megatron.doctor.machine import driver_gpus, interfaces
from real_megatron.rollout.remote.ports import in_use
from real_megatron.version import VERSION

PACKAGES = ("torch", "megatron-core", "transformers")
SILENCE_S = 20
_MARK = f"REAL_PREFLIGHT={secrets.token_hex(8)}"
"""In the environment of what is started here, by which it is found: torchrun gives each rank a session of its own."""
_starting = threading.Lock()
INFINIBAND = Path("/sys/class/infiniband")


def clock() -> float:
    """This host's time."""
    return time.time()


def facts() -> dict[str, Any]:
    """Software, GPUs and network of this host."""
    return {
        "software": {"Python": platform.python_version(), **_versions(), **_commit()},
        "gpus": [asdict(gpu) for gpu in driver_gpus()],
        "interfaces": interfaces(),
        "infiniband": sorted(one.name for one in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else [],
    }


def _versions() -> dict[str, str]:
    found = {"real_megatron": VERSION}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _commit() -> dict[str, str]:
    """Commit of the checkout that this runs from, and a digest of what was changed since."""
    root = str(Path(__file__).parents[2])
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        changes = _git(root, "diff", "HEAD", "--", "real_megatron")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "none", "changes": ""}
    return {"commit": commit[:12], "changes": hashlib.sha256(changes).hexdigest()[:12] if changes else ""}


def _git(root: str, *arguments: str) -> bytes:
    # A checkout may be another user's, as on a shared file system; nothing of it is run.
    command = ["git", "-c", f"safe.directory={root}", "-C", root, *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


def write(directory: str, name: str) -> int:
    """Leave a file in the shared directory; returns the bytes that are free there."""
    Path(directory, name).write_text(name, encoding="utf-8")
    return shutil.disk_usage(directory).free


def unseen(directory: str, names: list[str], wait_s: float) -> list[str]:
    """Those of the files that are not seen here within `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while left := [name for name in names if not _reads(Path(directory, name), name)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def remove(directory: str, name: str) -> None:
    """Take the file of `write` away."""
    Path(directory, name).unlink(missing_ok=True)


def taken(address: str, ports: list[int]) -> dict[str, str]:
    """Ports of this host at which nothing could listen, each with who does."""
    found = {}
    for port in ports:
        try:
            if in_use(port, address):
                found[str(port)] = _listener(port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # which the network check says
                found[str(port)] = error.strerror or str(error)
    return found


def _listener(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return "another process"


def run(command: list[str], environment: dict[str, str], unless_set: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Run a command to its end, or the end of its time.

    environment: variables for it; unless_set: further ones, where this host has none of that name
    """
    name, _, value = _MARK.partition("=")
    with _starting:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**unless_set, **os.environ, **environment, name: value},
            start_new_session=True,
        )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return {"status": process.returncode, "output": output[-20_000:]}
    except subprocess.TimeoutExpired:
        return {"status": None, "output": ""}
    finally:
        _end_marked()
        process.wait()


def _end_marked() -> None:
    """Kill what was started here, whatever session it has made, until nothing is left."""
    while left := _marked():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's; of one that has ended, the environment is empty
            if _MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


ANSWERS: dict[str, Callable[..., Any]] = {
    "clock": clock,
    "facts": facts,
    "write": write,
    "unseen": unseen,
    "remove": remove,
    "taken": taken,
    "run": run,
}


def _listen(questions: "queue.SimpleQueue[str]", heard: list[float]) -> None:
    for line in sys.stdin:
        heard[0] = time.monotonic()
        if line.strip():
            questions.put(line)
    _end()


def _end_in_silence(heard: list[float]) -> None:
    while time.monotonic() - heard[0] < SILENCE_S:
        time.sleep(1)
    _end()


def _end() -> None:
    """End this process and what it has started, and start nothing more."""
    _starting.acquire()
    _end_marked()
    os._exit(0)


def main() -> None:
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"answer": "here"}), file=lines, flush=True)
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    heard = [time.monotonic()]
    threading.Thread(target=_listen, args=(questions, heard), daemon=True).start()
    threading.Thread(target=_end_in_silence, args=(heard,), daemon=True).start()
    while True:
        line = questions.get()
        question = json.loads(line)
        try:
            answer = {"answer": ANSWERS[question.pop("ask")](**question)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    main()
