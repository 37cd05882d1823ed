"""What a step leaves: its row, with tokens per second and MFU by hand, and the lines that are printed, also on what is
wrong with it."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from real_megatron.config import RunConfig
from real_megatron.policy.parallel_groups import Runtime
from real_megatron.training import step_log
from real_megatron.training.step_log import StepLog

NORMAL = {"loss": 0.5, "valid": 0.5, "grad_norm": 1.0, "rollout/steps_without_answer": 0.0, "rollout/truncated": 0.5}
SILENT = NORMAL | {"valid": 0.0, "grad_norm": 0.0, "rollout/steps_without_answer": 1.0, "rollout/truncated": 1.0}
SFT = {"loss": 0.5, "grad_norm": 1.0}


def lines(output: Path, steps: list[dict[str, float]], caplog: pytest.LogCaptureFixture, rank: int = 0) -> list[str]:
    """The log of a run of these steps, the warnings marked."""
    config = RunConfig.model_validate({"output": str(output), "metrics": {"tensorboard": False}})
    caplog.set_level(logging.INFO)
    caplog.clear()
    with StepLog(config, Runtime(torch.device("cpu"), rank, 2, 0, 1), 0, len(steps)) as log:
        for done, values in enumerate(steps, start=1):
            log.step(done, {"tokens": 8.0, "model_flops": 1.0} | values, {"step": 1.0, "update": 1.0})
    return [f"{'! ' * (r.levelno > logging.INFO)}{r.getMessage()}" for r in caplog.records]


def test_a_fault_is_said_once_and_marked_in_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown = lines(tmp_path, [NORMAL, SILENT, SILENT, NORMAL, NORMAL | {"grad_norm": 0.0}], caplog)
    warnings = [line for line in shown if line.startswith("! ")]
    assert len(warnings) == 2 and len(shown) == 7
    assert warnings[0].startswith("! step 2: no answer (no response has a score anchor") and shown[1] == warnings[0]
    assert "; all cut off (every" in warnings[0] and "; gradient 0 (" in warnings[0]
    assert warnings[1].startswith("! step 5: gradient 0 (it is exactly 0")
    marks = [line.split("  ")[1] for line in shown if line not in warnings]
    assert marks == ["loss 0.5", "NO ANSWER", "NO ANSWER", "loss 0.5", "GRADIENT 0"]
    assert "step 3/5  NO ANSWER  ALL CUT OFF  GRADIENT 0  loss 0.5  valid 0  grad_norm 0" in shown[3]


def test_supervised_steps_have_a_gradient_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "! step 1: gradient 0" in lines(tmp_path, [SFT | {"grad_norm": 0.0}], caplog)[0]
    assert len(lines(tmp_path, [SFT, SFT], caplog)) == 2


def test_rank_0_speaks_for_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(tmp_path, [SILENT], caplog, rank=1) == []


VALUES = {"tokens": 1200.0, "model_flops": 6e9, "loss": 0.5, "reward": -1.25}
SECONDS = {"other": 1.0, "rollout": 3.0, "update": 2.0, "evaluate": 4.0, "checkpoint": 5.0, "step": 15.0}


def log(output: Path, rank: int = 0, start: int = 0, **metrics: int) -> StepLog:
    settings = [f"metrics.{key}={value}" for key, value in {"tensorboard": False, **metrics}.items()]
    config = RunConfig.from_yaml(None, [f"output={output}", *settings])
    return StepLog(config, SimpleNamespace(rank=rank, world_size=4, device=torch.device("cpu")), start, steps=7)


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_row_has_the_steps_metrics_and_what_follows_from_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens per second of the time without evaluation and checkpoint, MFU of the update on four GPUs."""
    with log(tmp_path / "cpu") as steps:
        steps.step(1, VALUES, SECONDS)
        steps.step(2, VALUES, {"other": 1.0, "update": 2.0, "step": 3.0})
        assert steps.last_step() == 2
    first, second = rows(tmp_path / "cpu")
    seconds = {f"seconds/{name}": value for name, value in SECONDS.items()}
    assert first == {"step": 1, **VALUES, **seconds, "tokens_per_second": 1200 / (15 - 4 - 5)}
    assert second["tokens_per_second"] == 400 and "mfu" not in second
    monkeypatch.setattr(step_log, "peak_flops", lambda device: 1e9)
    with log(tmp_path / "gpu") as steps:
        steps.step(1, VALUES, SECONDS)
    assert rows(tmp_path / "gpu")[0]["mfu"] == 6e9 / 2.0 / (1e9 * 4)


@pytest.mark.parametrize(("every", "printed"), [(0, [7]), (1, [4, 5, 6, 7]), (3, [6, 7])])
def test_a_line_is_printed_every_so_many_steps_and_at_the_end(
    every: int, printed: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with log(tmp_path, start=3, print_every=every) as steps:
        for done in (4, 5, 6, 7):
            steps.step(done, VALUES, SECONDS)
    figures = "loss 0.5  reward -1.25  tokens_per_second 200"
    assert [record.getMessage() for record in caplog.records] == [f"step {n}/7  {figures}" for n in printed]


def test_only_rank_0_leaves_rows(tmp_path: Path) -> None:
    with log(tmp_path / "run", rank=1) as steps:
        steps.step(1, VALUES, SECONDS)
        steps.row(2, VALUES)
        assert steps.last_step() is None
    assert not (tmp_path / "run").exists()
