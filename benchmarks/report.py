"""The page that a benchmark prints and writes: where and how it ran, its tables, and the bars that it has to meet."""

import io
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch


def hardware(device: str) -> str:
    """The GPU, or the CPU with cores and threads; memory; and the load average now. Call it before measuring."""
    load = f"load average before the run {os.getloadavg()[0]:.1f}"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; {load}"
    memory = psutil.virtual_memory().total / 2**30
    return f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB memory; {load}"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def software(*packages: str) -> str:
    """Versions of Python, torch and those of the packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", *packages):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def command(name: str, hidden: Mapping[str, str] | None = None) -> str:
    """The benchmark's command as run.

    `hidden` maps options whose values are paths of one machine to what is shown in their place.
    """
    hidden = hidden or {}
    shown: list[str] = []
    for argument in sys.argv[1:]:
        option, equals, _ = argument.partition("=")
        if shown and shown[-1] in hidden:
            argument = hidden[shown[-1]]
        elif equals and option in hidden:
            argument = f"{option}={hidden[option]}"
        shown.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{name}", *shown])


def preamble(title: str, hardware: str, software: str, command: str) -> list[str]:
    """The lines that every page begins with."""
    return [
        f"# {title}",
        "",
        f"- Hardware: {hardware}",
        f"- Software: {software}",
        f"- Command: `{command}`",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    return [
        _row(header),
        _row(["---"] * left + ["---:"] * (len(header) - left)),
        *(_row(row) for row in rows),
    ]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


@dataclass(frozen=True)
class Bar:
    """Something that a benchmark has to show: `measured` at least (or at most) `bound`, both ratios."""

    what: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "met" if self.met else "NOT MET"
        return f"- {self.what}: {self.measured:.3g}×, bar {sign} {self.bound:g}×: **{verdict}**"


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Write the page to `output` where that is given, and print it."""
    save(lines, output)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print("\n".join(lines) + "\n")


def save(lines: Sequence[str], output: Path | None) -> None:
    """Write the page, or what there is of it so far: a benchmark that is cut short leaves its tables."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
