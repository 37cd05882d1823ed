"""benchmarks.head runs and prints what it promises. The numbers of so small a shape mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import head, head_bars

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


def test_a_gpus_bars_are_those_of_its_card_and_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = head.Shape(8192, 151_936, 4096, torch.bfloat16, "cuda")
    for card, count in (("NVIDIA H200", 2), ("NVIDIA H100 80GB HBM3", 1)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        bars = head_bars.over_logits(shape, 2.2, 1.74)
        assert len(bars) == count and not any(bar.met for bar in bars)
        bars = head_bars.from_hidden(shape, 53.0, 600.0)
        assert [bar.met for bar in bars] == [False, True]
    assert not head_bars.over_logits(head.Shape(64, 512, 32, torch.bfloat16, "cuda"), 1.0, 1.0)
    assert not head_bars.from_hidden(head.Shape(8192, 151_936, 4096, torch.float32, "cuda"), 1.0, 1.0)
