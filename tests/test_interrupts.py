"""Ctrl-C and SIGTERM: one line, the status that a shell reports for the signal, and what was done is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from real_megatron.cli import app
from real_megatron.data.byte_model import make_byte_model
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.training.stop import Terminated

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("own_logging")


def run(*arguments: str | Path) -> Result:
    """The command in this process; its output has the log, too."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def signals_itself(number: int) -> Any:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    return stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "sft", "report"])
def test_before_there_is_anything_to_save_a_command_ends_at_once(
    command: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a model loads. Afterwards signals are what they were."""
    for place in ("training.rl.train", "training.sft.train", "evaluation.report.read_run"):
        monkeypatch.setattr(f"real_megatron.{place}", signals_itself(number))
    (tmp_path / "run.yaml").write_text("{}")
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    result = run(command, tmp_path if command == "report" else tmp_path / "run.yaml")
    (line,) = (result.output).splitlines()
    assert result.exit_code == 128 + number
    assert line.endswith(f"stopped by {signal.Signals(number).name}: run the same command again to go on")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_has_saved_has_the_signals_status(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise Terminated("stopped after step 3", number)

    monkeypatch.setattr("real_megatron.training.rl.train", stopped)
    (tmp_path / "run.yaml").write_text("{}")
    result = run("train", tmp_path / "run.yaml")
    assert result.exit_code == 128 + number and "stopped after step 3" in result.output


def test_under_torchrun_sigterm_ends_a_rank_that_hangs_and_one_rank_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("real_megatron.training.rl.train", stop)
    (tmp_path / "run.yaml").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = run("train", tmp_path / "run.yaml")
        assert result.exit_code == 130 and result.output.count("stopped by SIGINT") == (rank == "0")
    assert seen == [signal.getsignal(signal.SIGTERM)] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


class Calls:
    """Counts the engine's calls, and signals this process in the third one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.count, real = 0, TransformersEngine.generate

        def generate(engine: TransformersEngine, *asked: Any) -> Any:
            self.count += 1
            if self.count == 3:
                os.kill(os.getpid(), number)
            return real(engine, *asked)

        monkeypatch.setattr(TransformersEngine, "generate", generate)


def test_what_is_judged_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(6)))
    calls = Calls(monkeypatch, signal.SIGINT)
    command = ["judge", "--model", model, "--input", source, "--output", output]
    command += ["data.max_response_tokens=2", "evaluation.batch_size=2"]
    result = run(*command)
    assert result.exit_code == 130 and calls.count == 3
    assert f"4 rows of {source} are judged; run the same command again" in result.output
    result = run(*command)
    assert result.exit_code == 0 and "2 rows judged, 4 done before" in result.output and calls.count == 4


def test_an_evaluation_goes_on_where_it_was_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers of one that was not, and not with what other settings have left."""
    rows = "".join(json.dumps({"prompt": f"row {i}", "label": 1 + i % 5}) + "\n" for i in range(6))
    (tmp_path / "dev.jsonl").write_text(rows)
    (tmp_path / "run.yaml").write_text(
        f"data: {{eval: {{dev: {{path: {tmp_path / 'dev.jsonl'}}}}}, max_response_tokens: 2}}\n"
        "evaluation: {batch_size: 2, bootstrap: 5}\n"
    )

    def evaluate(output: str, *overrides: str) -> Result:
        return run("evaluate", tmp_path / "run.yaml", "--model", model, "--output", tmp_path / output, *overrides)

    assert evaluate("whole").exit_code == 0
    calls = Calls(monkeypatch, signal.SIGTERM)
    result = evaluate("cut")
    assert result.exit_code == 143
    assert "stopped by SIGTERM: what is judged is kept; run the same command again" in result.output
    (partial,) = (tmp_path / "cut/evaluation").iterdir()
    text = partial.read_text()
    partial.write_text(text[:-3])  # and killed while it wrote
    result = evaluate("cut")
    assert result.exit_code == 0 and calls.count == 3 + 2
    assert "test set dev: goes on behind 3 of 6 examples" in result.output
    names = sorted(path.name for path in (tmp_path / "whole/evaluation").iterdir())
    assert sorted(path.name for path in (tmp_path / "cut/evaluation").iterdir()) == names
    predictions = [
        [json.loads(line) for line in (tmp_path / output / "evaluation/dev.predictions.jsonl").read_text().splitlines()]
        for output in ("whole", "cut")
    ]
    for whole, cut in zip(*predictions, strict=True):
        assert (whole.pop("critiques"), whole.pop("id")) == (cut.pop("critiques"), cut.pop("id"))
        # Batches of other sizes: float32 logits differ in the last bits.
        assert cut["rail"] == pytest.approx(whole["rail"], rel=1e-4) and cut["sampled"] == whole["sampled"]
    partial.write_text(text)
    assert evaluate("cut", "seed=1").exit_code == 0 and calls.count == 5 + 3


CONVERTS = """
import sys
from pathlib import Path
from real_megatron.bridge.workers import run
from real_megatron.cli import reported
from tests.support.worker_tasks import write_on_and_on
with reported():
    tasks = [("write", Path(folder)) for folder in sys.argv[1:]]
    run(write_on_and_on, tasks, 6000, workers=2, title="test", show_progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_the_workers_of_a_conversion_without_tracebacks(number: int, tmp_path: Path) -> None:
    """It reaches every process of the group. What cannot be received reaches the first one alone."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERTS, *map(str, folders)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 300
    # The other one may be about to start.
    while not any(any(folder.iterdir()) for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    out, errors = process.communicate(timeout=300)  # the workers hold the pipes: they are gone when this returns
    assert 0 < sum(len(list(folder.iterdir())) for folder in folders) < 6000 and out == ""
    if number == signal.SIGINT:
        assert process.returncode == 130
        (line,) = errors.splitlines()
        assert line.endswith("stopped by SIGINT: run the same command again to go on")
