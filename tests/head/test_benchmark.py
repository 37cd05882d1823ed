"""tools/benchmark_head.py runs and prints what it promises. The numbers of so small a shape mean nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_head.py"


def test_benchmark_prints_and_writes_its_tables(tmp_path: Path) -> None:
    shape = ["--shape", "16,300,8", "--dtype", "float32", "--repeats", "1"]
    what = ["--tables", "logits", "chunks", "--only", "in place", "--output", str(tmp_path / "report.md")]
    done = subprocess.run([sys.executable, str(TOOL), *shape, *what], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout + "\n"
    assert "## T = 16, V = 300, H = 8, float32" in report
    for form in ("naive torch (log_softmax + gather)", "ours, fused, in place"):
        line = next(line for line in report.splitlines() if line.startswith(f"| {form} |"))
        assert len(line.split("|")) == 11
    assert "python tools/benchmark_head.py --shape 16,300,8" in report


def test_bars_say_whether_they_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_head", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "benchmark_head", tool)
    spec.loader.exec_module(tool)
    lines = [tool.Bar("speed", measured, 2, True).line() for measured in (2.0, 1.99)]
    assert lines == ["- speed: 2×, bar ≥ 2×: **met**", "- speed: 1.99×, bar ≥ 2×: **NOT MET**"]
    lines = [tool.Bar("memory", measured, 1 / 8, False).line() for measured in (0.125, 0.2)]
    assert lines == ["- memory: 0.125×, bar ≤ 0.125×: **met**", "- memory: 0.2×, bar ≤ 0.125×: **NOT MET**"]
    # Measured, not invented: both tables feed them, at a size whose numbers mean nothing.
    bars: list = []
    shape = tool.Shape(16, 300, 8, torch.float32, "cpu")
    monkeypatch.setattr(tool, "peak_of", lambda shape, kind, name: 1.0 if name.startswith("naive") else 0.25)
    tool.logits_table(shape, 1, "ours", bars)
    tool.head_table(shape, 1, "ours", bars)
    assert [(bar.bound, bar.at_least) for bar in bars] == [(2, True), (1 / 8, False)]
    assert bars[0].measured > 0 and bars[1].measured == 0.25 and "T = 16, V = 300, H = 8, float32" in bars[0].what
