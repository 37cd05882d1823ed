"""Every benchmark imports, and says how it is used; the measuring of commands and of memory."""

import importlib
import mmap
import sys

import pytest

from benchmarks import measure


@pytest.mark.parametrize("name", ["attention", "convert", "head", "host", "rollout", "scaling", "step", "training"])
def test_a_benchmark_says_how_it_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}" if name != "host" else "benchmarks.host.__main__")
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"python -m benchmarks.{name} " in shown and "--output" in shown


def test_a_command_is_measured_with_its_child_processes() -> None:
    child = "x = bytearray(64 << 20); import time; time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seconds, peak = measure.run_command([sys.executable, "-c", parent])
    assert seconds > 0.3 and peak > 64 * measure.MIB


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.run_command([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_the_peak_of_memory_counts_what_was_freed_since() -> None:
    before = measure.reset_peak("cpu")
    with mmap.mmap(-1, 64 * measure.MIB) as block:  # malloc could reuse freed pages, which are resident already
        block.write(bytes(len(block)))
    assert measure.peak_bytes("cpu") - before > 60 * measure.MIB
