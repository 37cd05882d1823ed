"""The page of a benchmark: tables, bars, and the lines that say where and how it ran."""

import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Bar


def test_bars_say_whether_they_are_met() -> None:
    lines = [Bar("speed", measured, 2, True).line() for measured in (2.0, 1.99)]
    assert lines == ["- speed: 2×, bar ≥ 2×: **met**", "- speed: 1.99×, bar ≥ 2×: **NOT MET**"]
    lines = [Bar("memory", measured, 1 / 8, False).line() for measured in (0.125, 0.2)]
    assert lines == ["- memory: 0.125×, bar ≤ 0.125×: **met**", "- memory: 0.2×, bar ≤ 0.125×: **NOT MET**"]


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert report.table(["K", "step", "s"], [[4, "ours", "1.5"], [8, "ours", 3]], left=2) == [
        "| K | step | s |",
        "| --- | --- | ---: |",
        "| 4 | ours | 1.5 |",
        "| 8 | ours | 3 |",
    ]


def test_the_hardware_line_names_cores_memory_and_load() -> None:
    line = report.hardware("cpu")
    assert "cores" in line and "threads" in line and "GiB memory" in line and "load average" in line


def test_software_leaves_out_what_is_not_installed() -> None:
    line = report.software("safetensors", "no-such-package")
    assert line.startswith("Python 3.") and "torch " in line and "safetensors " in line and "no-such" not in line


def test_the_command_is_shown_as_run_without_paths_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--work", "/scratch/a", "--k", "4", "8", "--only", "in place"])
    assert report.command("step") == "python -m benchmarks.step --work /scratch/a --k 4 8 --only 'in place'"
    assert report.command("step", {"--work": "DIR"}) == "python -m benchmarks.step --work DIR --k 4 8 --only 'in place'"
    monkeypatch.setattr(sys, "argv", ["x", "--work=/scratch/a", "--k", "4"])
    assert report.command("step", {"--work": "DIR"}) == "python -m benchmarks.step --work=DIR --k 4"


def test_a_page_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = [*report.preamble("Title", "one core", "Python", "python -m benchmarks.x"), "", "Text ≥ 1."]
    report.publish(page, tmp_path / "new" / "page.md")
    written = (tmp_path / "new" / "page.md").read_text(encoding="utf-8")
    assert written.startswith("# Title\n\n- Hardware: one core\n") and written.endswith("\n\nText ≥ 1.\n")
    assert written in capsys.readouterr().out
