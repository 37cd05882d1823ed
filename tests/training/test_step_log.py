"""What is shown of the steps: their numbers, and what is wrong with them."""

import logging
from pathlib import Path

import pytest
import torch

from real_megatron.config import RunConfig
from real_megatron.policy.parallel_groups import Runtime
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
