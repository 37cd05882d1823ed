"""tools/benchmark_head.py runs and prints what it promises. The numbers of so small a shape mean nothing."""

import subprocess
import sys
from pathlib import Path

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
