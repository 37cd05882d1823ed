"""What a run shows on the terminal: its own lines, and with --verbose those of other packages too."""

import io
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from real_megatron import terminal
from real_megatron.data.byte_model import make_byte_model

SPEAK = """
import logging, sys, warnings
from real_megatron.terminal import set_up_logging
set_up_logging(int(sys.argv[1]), verbose=sys.argv[2] == "verbose")
warnings.warn("a-future-warning", FutureWarning)
for owner in ("real_megatron.training", "real_megatronic"):
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(owner), level)(f"{owner}:{level}")
"""


def shown(rank: int, how: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, str(rank), how], capture_output=True, text=True, check=True, timeout=60
    )
    assert not done.stdout
    return done.stderr


def words(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines()]


def test_a_run_shows_its_own_lines_and_errors_of_others() -> None:
    ours = [f"real_megatron.training:{level}" for level in ("info", "warning", "error")]
    assert words(shown(0, "quiet")) == [*ours, "real_megatronic:error"]
    text = shown(3, "quiet")
    assert words(text) == [*ours[1:], "real_megatronic:error"] and text.count("rank 3: ") == 3


def test_verbose_shows_everything() -> None:
    text = shown(0, "verbose")
    assert "FutureWarning: a-future-warning" in text
    for owner in ("real_megatron.training", "real_megatronic"):
        assert all(f"{owner}:{level}" in text for level in ("debug", "info", "warning", "error"))


@pytest.mark.parametrize("verbose", [False, True])
def test_torch_does_not_warn_of_a_toolkit_without_a_gpu(verbose: bool) -> None:
    """Torch sets up its loggers when it is imported: after us, and not this one."""
    program = f"""if True:
        import logging
        from real_megatron.terminal import set_up_logging
        set_up_logging(0, verbose={verbose})
        import torch
        print(logging.getLogger("torch.utils.cpp_extension").isEnabledFor(logging.WARNING))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str(verbose)


def test_a_conversion_there_and_back_prints_its_result_alone(tmp_path: Path) -> None:
    """By `tools/` and by the command, which are the same; the weights are those of before, bit for bit."""
    source = make_byte_model(tmp_path / "source", num_hidden_layers=2)
    root = Path(__file__).parents[1]
    there = [root / "tools/convert_hf_to_megatron.py", source, tmp_path / "megatron", "--pipeline=2", "--workers=2"]
    back = ["-m", "real_megatron", "convert", "to-hf", tmp_path / "megatron", tmp_path / "hf", "--verify"]
    for arguments, lines in ((there, 1), (back, 2)):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=root
        )
        # On a busy machine it takes so long that it says how far it is.
        assert done.returncode == 0 and all(" MB after " in line for line in done.stderr.splitlines()), done.stderr
        # Torch 2.10's gloo writes to standard output itself, in C++.
        assert len([line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]) == lines
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


FIGURES = "NO ANSWER  loss 0.1234  reward -1.234  valid 0.9876  grad_norm 1.234  tokens_per_second 1.234e+04"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_bar_keeps_its_numbers_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "CONSOLE", Console(file=out, force_terminal=True, width=width, color_system=None))
    bar = terminal.progress(True)
    with bar:
        bar.update(bar.add_task("real", total=12345, figures=""), completed=10000, figures=FIGURES)
    line = out.getvalue().splitlines()[-2]  # behind it, the cursor is shown again
    assert "…" not in line and "real" in line and "10000/12345" in line
    assert [figure in line for figure in FIGURES.split("  ")] == [width == 200] * 6


def test_in_a_log_a_job_says_every_so_often_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while nothing new is done, and no more when it has ended."""
    monkeypatch.setattr(terminal, "CONSOLE", Console(file=io.StringIO(), force_terminal=False))
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.02)
    caplog.set_level(logging.INFO)

    def wait_for(line: str, times: int) -> None:
        while sum(record.getMessage() == line for record in caplog.records) < times:
            time.sleep(0.01)

    with terminal.Counter("rows") as shown, terminal.Counter("rows", enabled=False) as silent:
        silent("not said", 1, 2)
        shown("judging", 1000, 2000)
        wait_for("judging: 1,000 of 2,000 rows after 0:00 min", 2)
        shown("dev", 1, 20)
        wait_for("dev: 1 of 20 rows after 0:00 min", 1)
    with terminal.Counter("bytes") as shown:
        shown("HF → Megatron", 3_000_000, 5_000_000_000)
        wait_for("HF → Megatron: 3 of 5,000 MB after 0:00 min", 1)
    assert not any("not said" in record.getMessage() for record in caplog.records)
