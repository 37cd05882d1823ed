"""A run that stops and resumes is the run that did not stop."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from real_megatron.bridge import describe
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.hardware import find_gpu
from real_megatron.hf.side_files import read_config
from real_megatron.planning.storage import checkpoint_bytes, weight_bytes
from real_megatron.planning.workload import Layout
from real_megatron.training.dry_run import dry_run
from tests.support.ranks import TIMEOUT_S, run_ranks
from tests.support.tiny_runs import (
    children,
    failing,
    rows,
    tiny_config,
    train,
    train_until,
    train_with_broken_evaluation,
    weights,
    without_answers,
    write_tiny_task,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run_ranks(1, train, tiny_config(task, output, checkpoint={"save_hf": True}, metrics={"samples_every": 1}))
    return output


def test_a_checkpoint_holds_as_many_bytes_as_a_dry_run_says(task: Path, whole: Path) -> None:
    """All but scalars: the optimizer's step, the schedule, random states."""
    config = RunConfig.from_yaml(whole / "config.yaml")
    layout = Layout(describe(read_config(task / "model")), config.parallel, config.model, 1)
    stored = FileSystemReader(whole / "checkpoints/step-000003").read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in stored if isinstance(entry, TensorStorageMetadata) and entry.size.numel() > 1]
    held = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    assert held == checkpoint_bytes(replace(layout, model=config.model.model_copy(update={"dtype": "float32"})))
    assert weight_bytes(layout) == sum(map(len, weights(whole).values())) // 2, "auto is 16 bits where it is planned"


@pytest.mark.usefixtures("no_process_group")
def test_a_dry_run_sees_what_a_run_would_resume_from(task: Path, whole: Path, tmp_path: Path) -> None:
    config = RunConfig.from_yaml(whole / "config.yaml")
    lines = dict(dry_run(config, "train", 1, find_gpu("H100")).sections["files"])
    assert lines["output"].endswith("; the run goes on behind step 3 of 3") and lines["disk"].startswith("2 × ")
    rows = (task / "train_rl.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[1:]))
    other = config.with_overrides([f"data.train.0.path={tmp_path}/other.jsonl"])
    with pytest.raises(ConfigError, match="was trained with other data or another model"):
        dry_run(other, "train", 1, find_gpu("H100"))


@pytest.mark.parametrize("objective", [{}, {"kl": 0.1}], ids=["plain", "kl"])
def test_resumed_at_the_same_layout_it_is_bit_identical(
    objective: dict[str, float], task: Path, whole: Path, tmp_path: Path
) -> None:
    changes = {"objective": objective, "checkpoint": {"save_hf": True}, "metrics": {"samples_every": 1}}
    if objective:
        whole = tmp_path / "whole"
        run_ranks(1, train, tiny_config(task, whole, **changes))
    config = tiny_config(task, tmp_path / "cut", **changes)
    run_ranks(1, train_until, config, 1)
    assert len(rows(config.output)) == 1
    run_ranks(1, train, config)
    assert rows(config.output) == rows(whole)
    assert weights(config.output) == weights(whole)
    assert (config.output / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_resumed_at_another_layout_it_goes_on_alike(task: Path, whole: Path, tmp_path: Path) -> None:
    """Two steps behind the checkpoint: Adam's moments take part in the metrics of the second."""
    run_ranks(1, train_until, tiny_config(task, tmp_path), 1)
    run_ranks(4, train, tiny_config(task, tmp_path, parallel={"tensor": 2}))
    for resumed, expected in zip(rows(tmp_path), rows(whole), strict=True):
        assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert resumed["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_steps_without_an_answer_are_counted_across_a_resume(task: Path, tmp_path: Path) -> None:
    """Two before the stop and two after it make four; a count from 0 would go on to the sixth step. The anchor has two
    tokens and a response has one."""
    changes = {
        "objective": {"no_anchor": "penalize"},
        "data": {"max_response_tokens": 1},
        "scale": {"anchor": "good [RESULT] "},
    }
    config = tiny_config(task, tmp_path, steps=8, **changes)
    (message,) = run_ranks(1, without_answers, config, 2, 4)
    assert "no response of the last 4 steps has a score anchor" in message and "real-megatron sft" in message
    assert [(row["step"], row["rollout/steps_without_answer"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 3)]
    assert all("reward" not in row and row["advantage_abs"] == 0 for row in rows(tmp_path))


def test_another_run_is_not_resumed_and_a_finished_one_is_left_alone(task: Path, whole: Path) -> None:
    with pytest.raises(RuntimeError, match="belongs to another run") as error:
        run_ranks(1, train, tiny_config(task, whole, objective={"beta": 0.5}))
    assert ConfigError.__name__ in str(error.value) and "objective.beta: 1.0 in the checkpoint, 0.5 now" in str(
        error.value
    )
    other = AutoConfig.from_pretrained(task / "model")
    other.hidden_size *= 2
    AutoModelForCausalLM.from_config(other).save_pretrained(task / "other")
    AutoTokenizer.from_pretrained(task / "model").save_pretrained(task / "other")
    with pytest.raises(
        RuntimeError, match=r"other data or another model(.|\n)*model.path: config.json \(.*other\): its content"
    ):
        run_ranks(1, train, tiny_config(task, whole, model={"path": str(task / "other")}))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    (whole / ".hf.lock").touch()  # of a start that was killed right behind the export
    (whole.parent / "link").symlink_to(task)  # the same files under other names
    run_ranks(1, train, tiny_config(whole.parent / "link", whole, checkpoint={"save_hf": True}))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_an_export_of_fewer_steps_is_not_taken_for_the_runs(task: Path, tmp_path: Path) -> None:
    """A run that was given more steps and killed between its last checkpoint and the export."""
    run_ranks(1, train, tiny_config(task, tmp_path, steps=1, checkpoint={"save_hf": True}))
    before = weights(tmp_path)
    run_ranks(1, train, tiny_config(task, tmp_path, steps=2))
    assert weights(tmp_path) == before
    run_ranks(1, train, tiny_config(task, tmp_path, steps=2, checkpoint={"save_hf": True}))
    assert weights(tmp_path) != before and RunConfig.from_yaml(tmp_path / "hf/real_megatron.yaml").steps == 2
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("broken", ["in the middle", "at the end"])
def test_an_evaluation_that_fails_costs_nothing_but_itself(broken: str, task: Path, tmp_path: Path) -> None:
    """The checkpoint stands before it; the run that goes on from there makes up for the evaluation and its row."""
    sections = {
        "data": {"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}},
        "evaluation": {"bootstrap": 5, "every": 2},
        "checkpoint": {"every": 1, "save_hf": True},
    }
    whole, cut = (tiny_config(task, tmp_path / name, **sections) for name in ("whole", "cut"))
    run_ranks(1, train, whole)
    step = {"in the middle": 2, "at the end": 3}[broken]
    run_ranks(1, train_with_broken_evaluation, cut, step)
    assert [row["step"] for row in rows(cut.output)] == list(range(step))
    run_ranks(1, train, cut)
    assert rows(cut.output) == rows(whole.output)
    assert weights(cut.output) == weights(whole.output)


def test_sigterm_saves_and_leaves_the_evaluation_to_the_next_start(task: Path, tmp_path: Path) -> None:
    sections = {
        "data": {"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}},
        "evaluation": {"bootstrap": 5, "every": 1},
        "checkpoint": {"every": 1, "keep": 2},
    }
    whole, cut = (tiny_config(task, tmp_path / name, **sections) for name in ("whole", "cut"))
    run_ranks(1, train, whole)
    run_ranks(1, train_until, cut, 2)
    assert run_ranks(1, children) == [[]], "a save leaves no process, which the signal would end or a killed run leave"
    assert [row["step"] for row in rows(cut.output)] == [0, 1]
    assert sorted(path.name for path in (cut.output / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    before = (cut.output / "checkpoints/step-000002/.metadata").stat().st_mtime_ns
    run_ranks(1, train, cut)
    # Only the missing step was done: the saved one has not been written again.
    assert (cut.output / "checkpoints/step-000002/.metadata").stat().st_mtime_ns == before
    assert rows(cut.output) == rows(whole.output)


def test_torchrun_stopped_after_a_save_has_saved_and_goes_on(task: Path, tmp_path: Path) -> None:
    """As examples/launch/slurm.sbatch stops it: torchrun passes SIGTERM on to the process groups of its two ranks. No
    path of a socket fits into this TMPDIR."""
    scratch = tmp_path / ("x" * 108)
    scratch.mkdir()
    config = tiny_config(task, tmp_path / "run", steps=1000, checkpoint={"every": 1, "keep": 1000})
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with (tmp_path / "log").open("wb") as log:
        torchrun = subprocess.Popen(
            [*command, "real_megatron", "train", "run.yaml"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
            stdout=log,
            stderr=log,
        )
        try:
            while torchrun.poll() is None and not (config.output / "checkpoints/step-000001").exists():
                time.sleep(0.05)
            torchrun.terminate()
            torchrun.wait(TIMEOUT_S)
        finally:
            for process in psutil.Process(torchrun.pid).children(recursive=True) if torchrun.poll() is None else []:
                process.kill()
            torchrun.kill()
            torchrun.wait()
    said = re.findall(r"stopped by SIGTERM after step (\d+)", (tmp_path / "log").read_text(encoding="utf-8"))
    assert said and len(set(said)) == 1, (tmp_path / "log").read_text(encoding="utf-8")
    done = int(said[0])
    saved = config.output / f"checkpoints/step-{done:06d}/.metadata"
    assert sorted(path.name for path in (config.output / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in range(1, done + 1)
    ]
    before = saved.stat().st_mtime_ns
    run_ranks(2, train, config.with_overrides([f"steps={done + 1}"]))
    assert saved.stat().st_mtime_ns == before
    assert [row["step"] for row in rows(config.output)] == list(range(1, done + 2))


def test_an_error_of_any_kind_names_the_step(task: Path, tmp_path: Path) -> None:
    """Also one whose kind cannot be made from a message alone."""
    (message,) = run_ranks(1, failing, tiny_config(task, tmp_path))
    assert message.startswith("Expecting property name") and message.endswith(" at step 1, rank 0")


def test_a_damaged_checkpoint_is_named_with_the_fix(task: Path, tmp_path: Path) -> None:
    config = tiny_config(task, tmp_path, steps=1)
    run_ranks(1, train, config)
    for file in (tmp_path / "checkpoints/step-000001").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"OSError: .*step-000001: cannot be read \(.*remove it to resume"):
        run_ranks(1, train, tiny_config(task, tmp_path, steps=2))
