"""benchmarks.head runs and prints what it promises. The numbers of so small a shape mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import head

ROOT = Path(__file__).parents[2]


def test_benchmark_prints_and_writes_its_tables(tmp_path: Path) -> None:
    shape = ["--shape", "16,300,8", "--dtype", "float32", "--repeats", "1"]
    what = ["--tables", "logits", "chunks", "--only", "in place", "--output", str(tmp_path / "report.md")]
    command = [sys.executable, "-m", "benchmarks.head", *shape, *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout + "\n"
    assert "## T = 16, V = 300, H = 8, float32" in report
    for contender in ("naive torch (log_softmax + gather)", "ours, fused, in place"):
        line = next(line for line in report.splitlines() if line.startswith(f"| {contender} |"))
        assert len(line.split("|")) == 11
    assert "python -m benchmarks.head --shape 16,300,8" in report


def test_both_tables_feed_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, not invented, at a size whose numbers mean nothing."""
    bars: list[head.Bar] = []
    shape = head.Shape(16, 300, 8, torch.float32, "cpu")
    monkeypatch.setattr(head, "peak_of", lambda shape, kind, name: 1.0 if name.startswith("naive") else 0.25)
    head.logits_table(shape, 1, "ours", bars)
    head.head_table(shape, 1, "ours", bars)
    assert [(bar.bound, bar.at_least) for bar in bars] == [(2, True), (1 / 8, False)]
    assert bars[0].measured > 0 and bars[1].measured == 0.25 and "T = 16, V = 300, H = 8, float32" in bars[0].what
