"""Whole training runs on the tiny judge's words: data files, a very small checkpoint, configurations."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data.tiny_judge import FIVE, Grades, build_config, build_tokenizer, write_task
from real_megatron.errors import ConfigError, EngineError
from real_megatron.judging import evaluate as judging
from real_megatron.judging.critiques import write_critiques
from real_megatron.judging.file import JudgeSummary, judge_file
from real_megatron.judging.judge import Judge
from real_megatron.objective import Objective
from real_megatron.policy.policy import Policy
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.runtime import OtherRankFailed
from real_megatron.training import rl, rollouts, sft
from real_megatron.training.session import Session
from real_megatron.training.stop import Terminated
from tests.support.ranks import forget_policies


def write_tiny_task(directory: Path, head_dim: int = 8, grades: Grades = FIVE) -> Path:
    """The tiny-judge task with few examples and a model of two narrow layers instead of its own."""
    write_task(directory, seed=0, sft=64, rl=48, test=8, grades=grades)
    config = build_config(grades)
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 64, head_dim
    config.num_hidden_layers = 2
    config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    build_tokenizer(grades).save_pretrained(directory / "model")
    return directory


def tiny_config(task: Path, output: Path, **sections: Any) -> RunConfig:
    """Three REAL steps of four prompts; the anchor is forced, since random weights rarely find it."""
    base: dict[str, Any] = {
        "output": str(output),
        "steps": 3,
        "model": {"path": str(task / "model"), "vocab_multiple": 4},
        "batch": {"prompts": 4, "max_tokens": 256},
        "optimizer": {"lr": 1e-3},
        "objective": {"no_anchor": "force"},
        "rollout": {"n": 4},
        "data": {
            "train": [{"path": str(task / "train_rl.jsonl")}],
            "max_prompt_tokens": 32,
            "max_response_tokens": 8,
        },
        "checkpoint": {"save_hf": False},
        "metrics": {"tensorboard": False},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(base)


def train(config: RunConfig) -> None:
    """A whole run on every rank."""
    (rl if config.is_rl else sft).train(config)
    dist.barrier()


def train_and_saved_metrics(config: RunConfig) -> list[str]:
    """A whole run on every rank; the metrics, as JSON, that this rank gives to its checkpoints."""
    saved = []
    real_save = Session.save

    def save(session: Session, done: int, metrics: dict[str, float]) -> None:
        saved.append(json.dumps(metrics))
        real_save(session, done, metrics)

    with patch.object(Session, "save", save):
        train(config)
    return saved


def rows(output: Path) -> list[dict[str, float]]:
    """The run's metrics without those that measure time."""
    parsed = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds/") and k != "tokens_per_second"} for row in parsed
    ]


def train_until(config: RunConfig, step: int) -> None:
    """The same run, stopped while step `step` (counted from 1) runs: by SIGTERM to its process group, as torchrun and
    Slurm send it."""
    real_publish = Session.publish

    def publish(session: Session, done: int) -> None:
        real_publish(session, done)
        if done == step - 1:
            os.killpg(os.getpgrp(), signal.SIGTERM)

    Session.publish = publish
    try:
        train(config)
        raise AssertionError("the run was not stopped")
    except Terminated:
        pass
    finally:
        Session.publish = real_publish


def without_answers(config: RunConfig, stop: int, patience: int) -> str:
    """A run whose responses have no anchors, stopped while step `stop` runs and resumed: the error that ends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "PATIENCE", patience)
        train_until(config, stop)
        forget_policies()
        with pytest.raises(rollouts.NothingToTrain) as error:
            train(config)
    return with_notes(error.value)


def order_of_work(config: RunConfig) -> list[str]:
    """What a run does, in order: `start`s its engine, hands it the weights `after N` steps, `generate`s responses with
    those, makes an optimizer `update`, `evaluate`s after N steps."""
    log: list[str] = []

    def spied(real: Callable[..., Any], say: Callable[..., str]) -> Callable[..., Any]:
        def spy(*args: Any, **options: Any) -> Any:
            log.append(say(*args, **options))
            return real(*args, **options)

        return spy

    with pytest.MonkeyPatch.context() as patch:
        for holder, name, say in (
            (Session, "start_engine", lambda _: "start"),
            (TransformersEngine, "update_weights", lambda _, __, version: f"after {version}"),
            (TransformersEngine, "generate", lambda engine, *_: f"generate {engine.version}"),
            (Policy, "train_step", lambda *_: "update"),
            (Session, "evaluate", lambda _, done: f"evaluate {done}"),
        ):
            patch.setattr(holder, name, spied(getattr(holder, name), say))
        train(config)
    return log


def train_with_broken_evaluation(config: RunConfig, step: int) -> None:
    """The same run, whose engine fails in the evaluation after step `step`."""
    real_evaluate = Session.evaluate

    def evaluate(session: Session, done: int) -> dict[str, float]:
        if done == step:
            raise EngineError("no rollout server can serve")
        return real_evaluate(session, done)

    Session.evaluate = evaluate
    try:
        train(config)
        raise AssertionError("the evaluation did not fail")
    except EngineError:
        pass
    finally:
        Session.evaluate = real_evaluate


def children() -> list[list[str]]:
    """The commands of the processes that this rank has started and that still run."""
    return [child.cmdline() for child in psutil.Process().children(recursive=True)]


def with_notes(error: BaseException) -> str:
    """The error's message and the notes on where it happened."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def errors_of_runs(configs: list[RunConfig]) -> list[str]:
    """The message with which each run ends on this rank."""
    messages = []
    for config in configs:
        try:
            train(config)
        except (ConfigError, OtherRankFailed) as error:
            messages.append(str(error))
    return messages


def error_of_own_run(configs: list[RunConfig]) -> str:
    """The message with which a run ends whose ranks have a configuration each."""
    with pytest.raises(ConfigError) as error:
        train(configs[dist.get_rank()])
    return str(error.value)


def lock_during_and_after(config: RunConfig) -> tuple[bool, bool]:
    """Whether a run's output was locked while it saved, and is when it has ended."""
    lock, save, seen = config.output / ".lock", Session.save, []

    def looked(session: Session, *args: Any) -> None:
        seen.append(lock.exists())
        save(session, *args)

    with patch.object(Session, "save", looked):
        train(config)
    return seen == [True], lock.exists()


def weights(output: Path) -> dict[str, bytes]:
    """The exported Hugging Face tensors, bit by bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "hf/model.safetensors").items()}


def train_and_evaluate(config: RunConfig, output: Path) -> None:
    """A run, then its exported checkpoint evaluated on its own."""
    train(config)
    judging.evaluate(config, output=output)


def evaluate(config: RunConfig, output: Path) -> tuple[int, dict[str, str], int]:
    """The run's exported checkpoint, evaluated by all ranks: how often this rank computed metrics, what numbers it got,
    and how many predictions."""
    with patch.object(judging, "agreement", wraps=judging.agreement) as computed:
        results = judging.evaluate(config, output=output)
    numbers = {name: str(replace(result, predictions=[])) for name, result in results.items()}
    return computed.call_count, numbers, sum(len(result.predictions) for result in results.values())


def critiques(config: RunConfig, model: Path, output: Path, samples: int) -> int:
    """Critiques by `model` for the training prompts, written by all ranks."""
    return write_critiques(config, model, output, samples)


def judge(model: Path, source: Path, output: Path) -> JudgeSummary:
    """Judge a file with the configuration that the run left beside its checkpoint."""
    with Judge.from_pretrained(model) as loaded:
        return judge_file(loaded, source, output)


def failing(config: RunConfig) -> str:
    """A run whose first update meets broken JSON: the error's message."""
    real_update = Policy.train_step

    def update(policy: Policy, groups: list[Group], objective: Objective) -> dict[str, float]:
        return json.loads("{broken")

    Policy.train_step = update
    try:
        train(config)
    except ValueError as error:
        return with_notes(error)
    finally:
        Policy.train_step = real_update
    raise AssertionError("the run did not stop")


def poisoned(config: RunConfig, step: int) -> tuple[str, bool]:
    """A run whose labels turn NaN in step `step`: the error's message, and whether that step left the weights alone."""
    real_update, seen = Policy.train_step, []
    before: dict[str, torch.Tensor] = {}

    def update(policy: Policy, groups: list[Group], objective: Objective) -> dict[str, float]:
        seen.append(policy)
        if len(seen) == step:
            before.update({name: tensor.clone() for name, tensor in policy.export()})
            groups = [replace(group, label=math.nan) for group in groups]
        return real_update(policy, groups, objective)

    Policy.train_step = update
    try:
        train(config)
    except (FloatingPointError, ValueError) as error:
        return with_notes(error), all(torch.equal(tensor, before[name]) for name, tensor in seen[-1].export())
    finally:
        Policy.train_step = real_update
    raise AssertionError("the run did not stop")
