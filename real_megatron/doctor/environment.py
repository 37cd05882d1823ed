"""What a Python environment holds, asked in a process of its own: an import may raise, hang or end its process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROBE = Path(__file__).parent / "probe.py"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Package:
    """One package of an environment."""

    distribution: str
    version: str
    there: bool
    error: str
    """Why it does not import; empty if it does, or is not there."""
    more: dict[str, str | int] = field(default_factory=dict)
    """Of torch: `cuda` and `nccl`, versions or empty; `gpus` that it can use."""


@dataclass(frozen=True)
class Environment:
    """A Python and packages of it."""

    python: str
    """Its version; empty where it does not run."""
    executable: str
    packages: dict[str, Package]
    """By distribution."""
    error: str = ""
    """Why it could not be asked."""


def look(modules: Mapping[str, str], python: str = sys.executable, timeout_s: float = TIMEOUT_S) -> Environment:
    """The packages of an environment. modules: distribution → module to import."""
    about: dict[str, str] = {}
    packages: dict[str, Package] = {}
    left = dict(modules)
    while True:
        lines, end = _ask(python, [f"{module}={name}" for name, module in left.items()], timeout_s)
        for line in lines:
            if "module" not in line:
                about = line
                continue
            name = line["distribution"]
            more = {key: line[key] for key in ("cuda", "nccl", "gpus") if key in line}
            packages[name] = Package(name, line["version"], line["there"], line["error"], more)
            left.pop(name)
        if not about:
            return Environment("", python, {}, end or "it printed nothing")
        if not left:
            return Environment(about["python"], about["executable"], packages)
        culprit = next(iter(left))
        packages[culprit] = Package(culprit, "", True, f"its import ended the process: {end}")
        left.pop(culprit)
        if not left:
            return Environment(about["python"], about["executable"], packages)


def _ask(python: str, arguments: list[str], timeout_s: float) -> tuple[list[dict], str]:
    """The probe's lines, and how it ended; empty if well."""
    try:
        done = subprocess.run(
            [python, str(PROBE), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            # No variable of torchrun: a package that looks for its ranks would wait for them.
            env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return _lines(output), f"not done in {timeout_s:g} s"
    except OSError as error:
        return [], error.strerror or str(error)
    return _lines(done.stdout), describe_end(done.returncode, done.stderr) if done.returncode else ""


def _lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]


def describe_end(status: int, errors: str) -> str:
    """How a process ended: a signal's name, or the exit status and the last line of its errors."""
    if status < 0:
        return signal.Signals(-status).name
    last = (errors.strip().splitlines() or [""])[-1]
    return f"exit status {status}{': ' if last else ''}{last}"
