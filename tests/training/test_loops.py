"""The order of what both loops do, without a model: checkpoint, evaluation, row, stop; and how a run begins."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.evaluation.report import evaluation_path
from real_megatron.training import rl, session, sft
from real_megatron.training.batch_order import BatchOrder
from real_megatron.training.preparation import check_same_output
from real_megatron.training.session import Session
from real_megatron.training.stop import Terminated
from real_megatron.training.timer import PhaseTimer

ANSWERED = Group([1], [Trajectory([2, 3], 1), Trajectory([4, 3], 1)], label=1.0)


class Logged(Session):
    """A session whose work is only logged; when what is due is its own."""

    def __init__(self, config: RunConfig, stopped_in: int, breaks: str = "") -> None:
        """stopped_in: the step in which SIGTERM comes; breaks: what raises OSError"""
        self.config = config
        self.log: list[str] = []
        self.breaks = breaks
        self.groups, self.order = [ANSWERED], BatchOrder(1, 1, seed=0)
        self.steps, self.start, self.metrics_of_start = config.steps, 0, {}
        self.evaluation_sets = {"dev": None}
        self.best = SimpleNamespace(see=lambda done, values: self.log.append(f"seen {done}: {len(values)}"))
        self.scale, self.timer = SimpleNamespace(score_ids=[3]), PhaseTimer()
        self.updates = 0
        self.stop = SimpleNamespace(requested=lambda: self.updates >= stopped_in)
        self.policy = SimpleNamespace(runtime=SimpleNamespace(rank=0))
        self._check_in_place = lambda: None
        self.store = SimpleNamespace(settle=lambda wait=True: self.log.append("settle") if wait else None)

    def did(self, what: str) -> dict[str, float]:
        self.log.append(what)
        if what == self.breaks:
            raise OSError(what)
        return {}

    def update(self, *_: Any) -> dict[str, float]:
        self.updates += 1
        return self.did(f"update {self.updates}")

    def resume(self) -> None:
        self.did("resume")

    def finished(self) -> bool:
        return False

    def start_engine(self) -> None:
        self.did("start")

    def publish(self, step: int) -> None:
        self.did(f"publish {step}")

    def save(self, done: int, metrics: dict[str, float]) -> None:
        self.did(f"save {done}")

    def evaluate(self, done: int) -> dict[str, float]:
        return self.did(f"evaluate {done}")

    def export(self) -> None:
        self.did("export")

    @contextmanager
    def recording(self) -> Iterator[Any]:
        yield SimpleNamespace(step=lambda done, *_: self.did(f"row {done}"))


@pytest.fixture(params=["rl", "sft"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """work(overrides, stopped_in, breaks): what either loop does in four steps, without the start of an engine and the
    hand-over of weights, which reinforcement learning does besides."""

    def call(*overrides: str, stopped_in: int = 99, breaks: str = "") -> list[str]:
        name = "real" if request.param == "rl" else "raft"
        config = RunConfig.from_yaml(None, [f"objective.name={name}", "steps=4", *overrides])
        run = Logged(config, stopped_in, breaks)

        @contextmanager
        def opened(*_: Any) -> Iterator[Session]:
            yield run

        module = rl if config.is_rl else sft
        monkeypatch.setattr(module, "open_session", opened)
        monkeypatch.setattr(rl, "generate", lambda *_: ([ANSWERED], {}))
        for loop in (rl, sft):
            monkeypatch.setattr(loop, "update", lambda *_: run.update())
        try:
            module.train(config)
        except (Terminated, OSError) as error:
            run.log.append(type(error).__name__)
        return [what for what in run.log if what != "start" and not what.startswith("publish")]

    return call


EVERY = ("checkpoint.every=3", "evaluation.every=2")


def test_a_checkpoint_comes_before_the_evaluation_and_the_row(work: Callable[..., list[str]]) -> None:
    steps = ["update 1", "row 1", "update 2", "evaluate 2", "row 2", "update 3", "save 3", "row 3"]
    assert work(*EVERY) == ["resume", *steps, "update 4", "save 4", "evaluate 4", "row 4", "export"]
    assert work(*EVERY, breaks="evaluate 4")[-3:] == ["save 4", "evaluate 4", "OSError"]


def test_with_a_best_checkpoint_every_evaluation_has_one(work: Callable[..., list[str]]) -> None:
    best = "checkpoint.best=dev/rail/mse"
    steps = ["update 1", "row 1", "update 2", "save 2", "evaluate 2", "row 2", "update 3", "save 3", "row 3"]
    assert work(*EVERY, best) == ["resume", *steps, "update 4", "save 4", "evaluate 4", "row 4", "export"]


def test_a_run_that_is_asked_to_stop_saves_and_leaves_the_evaluation(work: Callable[..., list[str]]) -> None:
    """Also where no checkpoint is due; the row is left to the next start where an evaluation belongs to it."""
    assert work(*EVERY, stopped_in=1) == ["resume", "update 1", "save 1", "row 1", "Terminated"]
    assert work(*EVERY, stopped_in=2)[-3:] == ["update 2", "save 2", "Terminated"]
    assert work(*EVERY, stopped_in=3)[-3:] == ["save 3", "row 3", "Terminated"]


def test_in_the_last_step_a_run_is_not_stopped(work: Callable[..., list[str]]) -> None:
    assert work(*EVERY, stopped_in=4) == work(*EVERY)


# --- how a run begins -------------------------------------------------------------------------------------------------


class Row(SimpleNamespace):
    """Stands for StepLog: keeps the rows that it is given."""

    def __enter__(self) -> "Row":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def last_step(self) -> int | None:
        return self.last

    def row(self, step: int, values: dict[str, float]) -> None:
        self.rows.append((step, values))


@pytest.mark.parametrize(
    ("every", "start", "last", "rows"),
    [
        (0, 0, None, []),
        (2, 0, None, [(0, {"eval": 0.0})]),
        (2, 4, 4, []),
        (2, 4, 3, [(4, {"loss": 0.5, "eval": 4.0})]),
        (3, 4, 3, [(4, {"loss": 0.5})]),
    ],
)
def test_a_run_begins_with_the_evaluation_and_the_row_that_are_missing(
    every: int,
    start: int,
    last: int | None,
    rows: list[tuple[int, dict[str, float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And without the evaluations of steps that it does again."""
    found: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(session, "StepLog", lambda *_: Row(last=last, rows=found))
    for step in (4, 5):
        evaluation_path(tmp_path, "dev", step).parent.mkdir(exist_ok=True)
        evaluation_path(tmp_path, "dev", step).write_text("{}")
    config = RunConfig.from_yaml(None, [f"output={tmp_path}", f"evaluation.every={every}", "steps=9"])
    run = Logged(config, 99)
    run.start, run.metrics_of_start, run.stop = start, {"loss": 0.5}, Row()
    run.evaluate = lambda done: {"eval": float(done)}
    with Session.recording(run):
        assert found == rows
        assert RunConfig.from_yaml(tmp_path / "config.yaml") == config
        left = {path.name for path in (tmp_path / "evaluation").iterdir()}
        assert left == ({"dev-step-000004.json"} if start else set())


def test_a_run_that_must_not_be_resumed_is_not(tmp_path: Path) -> None:
    run = Logged(RunConfig.from_yaml(None, ["checkpoint.resume=false"]), 99)
    saved = SimpleNamespace(clear=lambda: None, newest=lambda: (3, tmp_path / "step-000003"))
    with pytest.raises(ConfigError, match="step-000003 exists and checkpoint.resume is false: choose another output"):
        check_same_output(run.config, saved)
    run.store = SimpleNamespace(clear=lambda: None, newest=lambda: None)
    Session.resume(run)
    assert run.start == 0


def test_a_checkpoint_says_what_it_belongs_to(tmp_path: Path) -> None:
    run = Logged(RunConfig.from_yaml(None, ["seed=3"]), 99)
    run.inputs, saved = {"data.template": "a digest"}, []
    (tmp_path / "5").mkdir()
    run.store = SimpleNamespace(save=lambda step, write: write(tmp_path / str(step)))
    run.policy.save = lambda *of: saved.append(of)
    Session.save(run, 5, {"loss": 0.5})
    state = {"step": 5, "config": run.config.model_dump(mode="json"), "inputs": run.inputs, "metrics": {"loss": 0.5}}
    assert saved == [(tmp_path / "5", state)]
    assert RunConfig.from_yaml(tmp_path / "5/real_megatron.yaml") == run.config


def test_an_asynchronous_checkpoint_is_waited_for_where_the_run_ends() -> None:
    run, found = Logged(RunConfig.from_yaml(None, ["steps=4", "checkpoint.asynchronous=true"]), 99), []
    run.inputs = {}
    run.store = SimpleNamespace(
        save=lambda step, write: found.append(f"save {step}"), begin=lambda step, write: found.append(f"begin {step}")
    )
    for done, run._stopped_by in ((1, 0), (2, 15), (4, 0)):
        Session.save(run, done, {})
    assert found == ["begin 1", "save 2", "save 4"]


def test_an_evaluation_becomes_metrics_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With colocated servers the engine sleeps behind it only where no batch is sampled next. A checkpoint that may be
    the best is whole before it is decided about."""
    caplog.set_level(logging.INFO)
    names = ("rail/pearson", "rail/spearman", "rail/kendall", "rail/mse", "sampled/pearson", "sampled/mse", "no_anchor")
    summary = {name: 0.125 * i for i, name in enumerate(names)}
    asked = []

    def evaluate_sets(judge: Any, sets: Any, output: Path, **about: Any) -> dict[str, Any]:
        asked.append((judge.config, sets, output, about))
        return {"dev": SimpleNamespace(summary=lambda: summary)}

    monkeypatch.setattr(session, "evaluate_sets", evaluate_sets)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name, sleeps, best in (("real", False, []), ("raft", True, ["checkpoint.best=dev/rail/mse"])):
        overrides = [f"output={tmp_path}", f"objective.name={name}", "rollout.colocate=true", *best]
        config = RunConfig.from_yaml(None, overrides)
        run = Logged(config, 99)
        run.tokenizer, run.engine_in_use = None, run.recording()
        run._published, run._engine = 6, SimpleNamespace(sleep=lambda run=run: run.did("sleep"))
        assert Session.evaluate(run, 6) == {f"eval/dev/{key}": value for key, value in summary.items()}
        assert asked.pop() == (config, run.evaluation_sets, tmp_path, {"step": 6, "about": {"run": str(tmp_path)}})
        assert (
            run.log == ["publish 6", *["sleep"] * sleeps, *["settle"] * len(best), f"seen 6: {len(names)}"]
            and (run._published is None) == sleeps
        )
    assert "step 6, dev: rail/pearson 0.000  rail/spearman 0.125" in caplog.text
    assert Session.evaluate(SimpleNamespace(evaluation_sets={}), 6) == {}
