"""The best checkpoint stays, whatever its age, and a run that was stopped anywhere keeps the same one."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.training.best import FILE, BestCheckpoint, check_best
from real_megatron.training.checkpoints import CheckpointStore
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import rows, tiny_config, train, train_until, train_with_broken_evaluation, write_tiny_task

METRIC = "dev/rail/pearson"


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def decided(directory: Path, values: dict[int, float | None], metric: str = METRIC, keep: int = 1) -> tuple[Any, ...]:
    """The best checkpoint and all that are there after checkpoints of these steps, of which those with a value were
    evaluated; each by a start of its own, as if the run were killed after every step."""
    for step, value in values.items():
        store = CheckpointStore(directory, keep)
        best = BestCheckpoint(store, metric)
        store.save(step, lambda path: None)
        if value is not None:
            best.see(step, {f"eval/{metric}": value})
    file = directory / FILE
    return (json.loads(file.read_text())["step"] if file.exists() else None), kept(directory)


def test_the_best_stays_and_what_is_no_longer_the_best_goes(tmp_path: Path) -> None:
    assert decided(tmp_path, {1: 0.5, 2: 0.4, 3: None, 4: 0.5}) == (1, [1, 4])  # of equal ones the earliest
    assert decided(tmp_path, {5: 0.6}) == (5, [5])
    assert decided(tmp_path, {6: math.nan, 7: math.nan}) == (5, [5, 7])
    assert json.loads((tmp_path / FILE).read_text()) == {"metric": METRIC, "step": 5, "value": 0.6}
    assert not list(tmp_path.glob("*.tmp"))
    assert decided(tmp_path, {8: 0.1, 9: 0.2}, keep=2) == (5, [5, 8, 9])


@pytest.mark.parametrize("kind", ["mse", "mae"])
def test_of_errors_the_smallest_is_the_best(kind: str, tmp_path: Path) -> None:
    metric = f"dev/sampled/{kind}"
    assert decided(tmp_path, {1: math.nan, 2: 0.5, 3: 0.7, 4: 0.4, 5: 0.9}, metric) == (4, [4, 5])
    # Another metric begins anew: its numbers are no errors.
    assert decided(tmp_path, {6: 0.2}) == (6, [6])


def test_without_a_metric_nothing_is_recorded(tmp_path: Path) -> None:
    assert decided(tmp_path, {1: 0.5, 2: 0.4}, metric="") == (None, [2])


def test_a_record_is_of_a_checkpoint_that_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Removed by hand, or damaged; and before the first step there is none to be the best."""
    assert decided(tmp_path, {1: 0.9, 2: 0.4}) == (1, [1, 2])
    (tmp_path / "step-000001").rmdir()
    assert decided(tmp_path, {3: 0.3}) == (3, [3])
    (tmp_path / FILE).write_text("{broken")
    assert decided(tmp_path, {4: 0.1}) == (4, [4])
    assert "best.json is no record of the best checkpoint" in caplog.text
    (tmp_path / "new").mkdir()
    store = CheckpointStore(tmp_path / "new", 1)
    BestCheckpoint(store, METRIC).see(0, {f"eval/{METRIC}": 0.9})
    assert not list((tmp_path / "new").iterdir())


EVALUATED = ("data.eval.in_domain.path=x", "evaluation.every=2", "data.eval.in_domain.within=aspect")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("checkpoint.best=in_domain/rail/pearson",), "data.eval is empty"),
        ((*EVALUATED, "evaluation.every=0", "checkpoint.best=in_domain/rail/mse"), "evaluation.every is 0"),
        ((*EVALUATED, "checkpoint.best=in_domain/rail/person"), "did you mean in_domain/rail/pearson?"),
        ((*EVALUATED, "checkpoint.best=eval/indomain/rail/mse"), "did you mean in_domain/rail/mse?"),
        ((*EVALUATED, "checkpoint.best=in_domain/no_anchor"), "is no metric of this run's evaluations"),
        ((*EVALUATED[:2], "checkpoint.best=in_domain/rail/pearson_within"), "did you mean in_domain/rail/pearson?"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_best(RunConfig.from_yaml(None, list(overrides)))
    assert message in str(error.value) and str(error.value).startswith("checkpoint.best")


def test_metrics_that_evaluations_have_are_accepted() -> None:
    for metric in ("", "in_domain/rail/pearson_within", "in_domain/sampled/accuracy"):
        check_best(RunConfig.from_yaml(None, [*EVALUATED, f"checkpoint.best={metric}"]))


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


def run_and_say(config: RunConfig) -> list[str]:
    """A whole run; what it says of its best checkpoint."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("real_megatron.training.best")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(config)
    finally:
        logger.removeHandler(handler)
    return said


def test_a_run_that_is_stopped_anywhere_keeps_the_same_checkpoint(task: Path, tmp_path: Path) -> None:
    """Between a checkpoint and its evaluation, and in mid-step; on two ranks."""

    def config(name: str, **checkpoint: Any) -> RunConfig:
        return tiny_config(
            task,
            tmp_path / name,
            steps=5,
            optimizer={"lr": 3e-2},
            data={"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}},
            evaluation={"every": 1, "bootstrap": 5},
            checkpoint={"best": "dev/rail/mse", "every": 4, "keep": 1, **checkpoint},
        )

    said = run_ranks(2, run_and_say, config("whole"))
    values = {row["step"]: row["eval/dev/rail/mse"] for row in rows(tmp_path / "whole") if row["step"]}
    best = min(values, key=lambda step: values[step])
    assert best not in (1, 5), "the test needs a best checkpoint that is neither the first nor the last"
    checkpoints = tmp_path / "whole/checkpoints"
    assert json.loads((checkpoints / FILE).read_text()) == {
        "metric": "dev/rail/mse",
        "step": best,
        "value": values[best],
    }
    assert kept(checkpoints) == [best, 5]
    path, model = checkpoints / f"step-{best:06d}", task / "model"
    convert = f"real-megatron convert to-hf {path} {tmp_path}/whole/hf-best --hf {model}"
    assert said == [[f"best by dev/rail/mse: step {best} ({values[best]:.6g}); for Hugging Face: {convert}"], []]
    for step in (best, best + 1):
        run_ranks(2, train_with_broken_evaluation, config("cut"), step)
    run_ranks(2, train_until, config("cut"), 5) if best < 4 else None
    run_ranks(2, train, config("cut"))
    assert (tmp_path / "cut/checkpoints" / FILE).read_text() == (checkpoints / FILE).read_text()
    assert kept(tmp_path / "cut/checkpoints") == [best, 5]
