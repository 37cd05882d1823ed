"""tools/gpu_acceptance.sh at toy size on the CPU, so that it works when a GPU turns up; it hides no failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = {
    "1": ["build the cpu kernels", "tests on a GPU", "benchmark of the head"],
    "2": [
        "benchmark of attention",
        "benchmark of the step, Qwen3-0.6B's size",
        "memory and time beside the plan, Qwen3-0.6B's size",
    ],
    "3": ["the tiny judge on GPU and CPU"],
    "4": [
        "make a toy model and data",
        "convert, and compare its logits with transformers'",
        "sft of a real model",
        "train a real model",
        "evaluate a real model",
        "report of a real model",
    ],
}
PAGES = {
    "1": ["gpu_head.md"],
    "2": ["gpu_attention.md", "gpu_step.md", "gpu_plan.md"],
    "3": ["gpu_training.md"],
    "4": ["gpu_model.md"],
}


def accept(*arguments: str, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools/gpu_acceptance.sh"), "--python", python, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def steps(summary: str) -> dict[str, str]:
    """Step → its result, from the summary's table."""
    rows = [
        line.strip("| ").split(" | ") for line in summary.splitlines() if line.startswith("| ") and "---" not in line
    ]
    return {row[1]: row[2] for row in rows[1:]}


SLOW = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="1.5 minutes: set LONG_TESTS=1")


@pytest.mark.parametrize("part", [pytest.param(part, marks=SLOW) if part > "1" else part for part in STEPS])
def test_a_part_runs_at_toy_size_on_a_cpu(part: str, tmp_path: Path) -> None:
    done = accept("--dry", "--part", part, "out", cwd=tmp_path)
    out = tmp_path / "out"
    summary = (out / "summary.md").read_text()
    assert done.returncode == 0, summary
    found = steps(summary)
    assert [name for name, result in found.items() if result == "passed"] == ["imports", *STEPS[part]], summary
    assert all(result == "passed" or result.startswith("not run: ") for result in found.values())
    names = {"summary.md", "log_0.txt", f"log_{part}.txt", *PAGES[part]}
    assert {path.name for path in out.iterdir()} == names
    assert len(names) <= 8  # as many as some machines send back
    assert "finished" in summary and "- Commit: " in summary


def test_what_fails_is_shown_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A python that runs nothing but the steps whose command has no `-m`."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *" -m "*|-m*) echo broken on purpose; exit 3;; esac\n')
    python.chmod(0o755)
    done = accept("--dry", "--part", "2", "--part", "4", str(tmp_path / "out"), cwd=tmp_path, python=str(python))
    summary = (tmp_path / "out/summary.md").read_text()
    found = steps(summary)
    assert done.returncode == 1
    assert found["imports"] == found["make a toy model and data"] == "passed"
    broken = [name for name, result in found.items() if result == "failed: exit status 3"]
    assert broken == [*STEPS["2"], *STEPS["4"][1:]]
    assert summary.count("broken on purpose") == len(broken)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (tmp_path / "empty").mkdir()
    arguments = ["--part", "4", "--wheels", "empty", "out"]
    done = accept(*arguments, cwd=tmp_path, python=str(python))
    found = steps((tmp_path / "out/summary.md").read_text())
    assert done.returncode == 1 and found["install the wheels"].startswith("failed: no wheels in ")
    assert found["a real model"] == "not run: no --model"
    done = accept("--part", "4", "--model", str(tmp_path), "again", cwd=tmp_path, python=str(python))
    found = steps((tmp_path / "again/summary.md").read_text())
    assert done.returncode == 0 and found["train a real model"] == "not run: no --data"


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The script with a part of ten seconds, in which the first step would sleep for a minute."""
    tools = tmp_path / "tools"
    (tools / "gpu").mkdir(parents=True)
    for name in ("gpu_acceptance.sh", "gpu/parts.sh"):
        shutil.copy(ROOT / "tools" / name, tools / name)
    script = (tools / "gpu_acceptance.sh").read_text().replace("part_seconds=480", "part_seconds=10")
    (tools / "gpu_acceptance.sh").write_text(script)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *benchmarks*) sleep 60;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(tools / "gpu_acceptance.sh"), "--part", "2", "--python", str(python), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=dict(os.environ))
    found = steps((tmp_path / "out/summary.md").read_text())
    assert done.returncode == 1 and found["benchmark of attention"] == "failed: not done in time"
    assert found[STEPS["2"][1]] == "not run: the part's 10 s are used up"


@pytest.mark.parametrize("arguments", [[], ["--part", "5", "out"], ["--wheels"], ["--fast", "out"], ["a", "b"]])
def test_wrong_arguments_are_refused(arguments: list[str], tmp_path: Path) -> None:
    done = accept(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("gpu_acceptance.sh: ")
    assert not list(tmp_path.iterdir())
