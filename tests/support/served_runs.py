"""Training runs with rollouts from a real server: their task, their settings, and the process that watches them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.config import RunConfig
from real_megatron.rollout.remote.process import LAUNCHER
from tests.support.tiny_runs import tiny_config, write_tiny_task

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES = 12, 4
# Two servers start in a run, perhaps on a busy machine: only a hang takes so long.
DEADLINE_S = 1800
# fp32 on both sides, Megatron beside the server: rounding alone.
SAME = 1e-4


def uneven_task(directory: Path, head_dim: int = 8) -> Path:
    """The tiny-judge task; weights large enough that every token's log-prob depends on every weight visibly."""
    write_tiny_task(directory, head_dim)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(directory / "model")
    return directory


def served_config(engine: str, task: Path, output: Path, rollout: dict, **sections) -> RunConfig:
    """A run with rollouts from one local server; `rollout` and `sections` go on top."""
    server = {"engine": engine, "n": SAMPLES, "concurrency": 2, "start_timeout_s": 900}
    batch, optimizer = {"prompts": PROMPTS}, {"lr": 1e-2}
    return tiny_config(task, output, rollout=server | rollout, batch=batch, optimizer=optimizer, **sections)


def watched(config: RunConfig, directory: Path, *steps: int, torchrun: bool = False) -> dict:
    """Run tests.support.rollout_training to its end, or end it; returns its record."""
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    # The launcher ends the run, and with it the servers, should this process be killed.
    command = [sys.executable, LAUNCHER]
    if torchrun:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    command += ["tests.support.rollout_training", "config.yaml", "record", *map(str, steps)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            status = "hangs"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdin.close()
    if status != 0:
        pytest.fail(f"the run ended with status {status}:\n" + (directory / "log").read_text()[-6000:])
    return json.loads((directory / "record").read_text())
