"""Updates that are not made: on every rank or on none, bit by bit as if their batch had not been."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from real_megatron.config import OptimizerConfig
from real_megatron.errors import EngineError
from real_megatron.policy.update_guard import FEWEST, WINDOW, Fault, UpdateGuard
from real_megatron.rollout.engine import Response, naming_prompts
from real_megatron.rollout.sampling import check_complete
from real_megatron.training.samples import sample_rows
from tests.support.policy_ranks import make_config, write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.skipping import decisions, run_with_faults, updates
from tests.support.tiny_runs import rows, tiny_config, train, weights, write_tiny_task

LAYOUTS = {"dp2": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_skip_what_one_rank_has_seen(layout: str, checkpoint: Path) -> None:
    """Each way to go wrong, on rank 1 alone: what follows is the run that never had these batches, its learning rates
    included."""
    config = make_config(checkpoint, parallel=LAYOUTS[layout], batch={"max_tokens": 400})
    faults = {0: "logprobs", 2: "loss", 3: "gradient"}
    plain = run_ranks(2, updates, config, [1, 4, 5])
    found = run_ranks(2, updates, config, [0, 1, 2, 3, 4, 5], faults, 1)
    for (curve, final, _), (expected, expected_final, _) in zip(found, plain, strict=True):
        assert [row["skipped_updates"] for row in curve] == [1, 0, 1, 1, 0, 0]
        assert [row["skipped_updates_total"] for row in curve] == [1, 1, 2, 3, 3, 3]
        assert [row["updates"] for row in curve] == [0, 1, 0, 0, 1, 1]
        made = [row for row in curve if row["updates"]]
        for row, other in zip(made, expected, strict=True):
            assert {**row, "skipped_updates_total": 0} == {**other, "skipped_updates_total": 0}
        assert equal(final, expected_final)
        assert all(math.isfinite(value) for row in curve for value in row.values())
        assert all("loss" not in row and row["tokens"] > 0 for row in curve if not row["updates"])
    said = found[0][2]
    assert not found[1][2] and len(said) == 3
    assert "step 1: the update is skipped: loss" in said[0] and "NaN or infinite values in token_logprobs" in said[0]
    assert "; examples: row-0-" in said[0]  # those of the trajectory
    assert "step 3: " in said[1] and "loss" in said[1] and ": not finite" in said[1]
    assert "step 4: the update is skipped, 2 in a row" in said[2] and "gradient norm nan: not finite" in said[2]
    assert "; examples of the batch: row-3-0, row-3-1, row-3-2, row-3-3, …" in said[2]


def test_groups_whose_scoring_pass_is_not_finite_are_skipped(checkpoint: Path) -> None:
    """Without a pass of the update."""
    config = make_config(checkpoint, batch={"max_tokens": 24})
    plain = run_ranks(2, updates, config, [1])
    for (curve, final, _), (expected, same, _) in zip(
        run_ranks(2, updates, config, [0, 1], {0: "scoring"}), plain, strict=True
    ):
        assert curve[0]["skipped_updates"] == 1 and curve[0]["split_groups"] > 0
        assert curve[1] == {**expected[0], "skipped_updates_total": 1} and equal(final, same)


@pytest.mark.parametrize(("most", "world"), [(0, 1), (2, 2)])
def test_too_many_in_a_row_end_the_run(most: int, world: int, checkpoint: Path) -> None:
    """One update that is made starts the count again."""
    config = make_config(checkpoint, optimizer={"max_skipped": most})
    bad = dict.fromkeys(range(most), "loss") | dict.fromkeys(range(most + 1, 20), "loss")
    for curve, _, said in run_ranks(world, updates, config, list(range(20)), bad, world - 1):
        assert len(curve) == most + 1 + most and sum(row["updates"] for row in curve) == 1
        assert f"optimizer.max_skipped = {most} in a row" in said[-1] and "optimizer.lr" in said[-1]
        assert said[-1].count("skipped before it: loss nan") == most


@pytest.mark.parametrize("plain", [True, False], ids=["distributed", "whole"])
def test_a_run_that_resumes_in_the_middle_of_a_row_ends_where_the_other_does(
    plain: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """Also where nothing was ever updated before the checkpoint, and at another layout."""
    faults = {0: "loss", 1: "gradient", 2: "logprobs"}
    config = make_config(checkpoint, optimizer={"max_skipped": 2}, parallel={"distributed_optimizer": plain})
    whole = run_ranks(1, updates, config, [0, 1, 2], faults, None, (1, tmp_path / "a"))[0]
    (resumed,) = run_ranks(1, updates, config, [1, 2], faults, None, None, tmp_path / "a")
    assert resumed[0] == whole[0][1:] and equal(resumed[1], whole[1])
    assert whole[2][-1] == resumed[2][-1] and whole[2][-1].count("skipped before it") == 2
    faults = {0: "loss", 1: "gradient"}
    whole = run_ranks(1, updates, config, [0, 1, 2, 3], faults, None, (1, tmp_path / "b"))[0]
    for world in (1, 2):
        for curve, final, _ in run_ranks(world, updates, config, [1, 2, 3], faults, None, None, tmp_path / "b"):
            assert [row["skipped_updates_total"] for row in curve] == [2, 2, 2]
            if world == 1:
                assert curve == whole[0][1:] and equal(final, whole[1])
            assert curve[-1]["loss"] == pytest.approx(whole[0][-1]["loss"], rel=1e-5)
            assert curve[-1]["lr"] == whole[0][-1]["lr"]


def test_a_spike_is_skipped_and_no_part_of_what_the_next_is_measured_against(checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint, optimizer={"spike_factor": 20.0, "warmup_steps": 0, "lr": 1e-5})
    seeds, faults = list(range(FEWEST + 4)), {3: "spike", FEWEST + 1: "spike", FEWEST + 2: "spike"}
    save = (FEWEST + 2, tmp_path)  # between the two
    (whole,) = run_ranks(1, updates, config, seeds, faults, None, save)
    # The fourth comes too early to be known as one.
    assert [i for i, row in enumerate(whole[0]) if row["skipped_updates"]] == [FEWEST + 1, FEWEST + 2]
    assert "more than optimizer.spike_factor = 20 times" in whole[2][0]
    assert f"the median of the last {FEWEST + 1} updates" in whole[2][0]
    (resumed,) = run_ranks(1, updates, config, seeds[FEWEST + 2 :], faults, None, None, tmp_path)
    assert resumed[0] == whole[0][FEWEST + 2 :] and equal(resumed[1], whole[1])
    assert "2 in a row" in resumed[2][0]
    off = config.with_overrides(["optimizer.spike_factor=0"])
    assert not any(row["skipped_updates"] for row in run_ranks(1, updates, off, seeds, faults)[0][0])


def test_ranks_decide_by_the_same_numbers() -> None:
    """A norm that differs, in its last bits at best, and a fault that one rank alone has seen."""
    assert run_ranks(2, decisions, 1) == [([*[False] * FEWEST, True, True, False], 2)] * 2


# --- the guard alone --------------------------------------------------------------------------------------------------


def skipped(norms: list[float], **settings: Any) -> list[bool]:
    guard = UpdateGuard(OptimizerConfig(**settings))
    return [guard.skips(0.5, norm, [], []) for norm in norms]


def test_a_spike_is_measured_against_the_median_of_the_last_updates() -> None:
    few = [1.0] * (FEWEST - 1)
    assert skipped([*few, 100.0, 100.0], spike_factor=10) == [False] * FEWEST + [True]
    assert skipped([*few, 1.0, 10.0, 10.1], spike_factor=10) == [False] * (FEWEST + 1) + [True]
    # The window moves on: after as many larger norms the larger one is the ordinary one.
    long = [1.0] * WINDOW + [9.0] * (WINDOW // 2 + 1)
    assert not any(skipped([*long, 80.0], spike_factor=10)) and skipped([*long[:-2], 80.0], spike_factor=10)[-1]
    # A median of 0 measures nothing.
    assert not any(skipped([0.0] * FEWEST + [1.0], spike_factor=10))


def test_what_is_not_finite_is_skipped_though_loss_and_norm_are() -> None:
    guard = UpdateGuard(OptimizerConfig())
    assert guard.skips(0.5, 1.0, [Fault("bad", ["a", "a", "b", "c", "d", "e"])], ["z"])
    assert guard.last == "loss 0.5, gradient norm 1.0: not finite; bad; examples: a, b, c, d, …"
    with pytest.raises(ValueError, match="spike_factor 0.5 would skip ordinary updates"):
        OptimizerConfig(spike_factor=0.5)


def test_samples_of_a_step_that_is_not_finite_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def rewards(scored: object) -> None:
        raise FloatingPointError("NaN or infinite values in score_logprobs")

    policy = SimpleNamespace(scored=lambda groups: None, runtime=SimpleNamespace(rank=0))
    assert sample_rows(policy, None, None, [], SimpleNamespace(rewards=rewards)) == []
    assert "no samples are shown of this step: NaN or infinite values in score_logprobs" in caplog.text


def test_an_engines_log_probs_that_are_not_finite_are_an_error_that_names_the_prompt() -> None:
    good, bad = Response([1], [-0.5], "stop", weight_version=0), Response([1], [math.nan], "stop", weight_version=0)
    with pytest.raises(EngineError, match="data.train: row-7: the rollout engine returned log-probabilities that are"):
        with naming_prompts(["data.train: row-6", "data.train: row-7"]):
            check_complete([[good], [bad]], 2, 1)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


def test_a_step_goes_on_behind_a_skipped_update(task: Path, tmp_path: Path) -> None:
    """With its other mini-batch, its checkpoint and its evaluation; samples of such a step are left out."""
    sections: dict[str, Any] = {
        "batch": {"mini_batches": 2},
        "objective": {"ratio": "truncated_is", "no_anchor": "force"},
        "data": {"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}},
        "evaluation": {"every": 1, "bootstrap": 5},
        "metrics": {"samples_every": 1},
        "checkpoint": {"every": 1, "keep": 9, "save_hf": True},
    }
    # Updates 3 and 4 are the second step's, 5 the third's first.
    run_ranks(2, run_with_faults, tiny_config(task, tmp_path, **sections), {3: "loss", 4: "logprobs", 5: "loss"}, 1)
    first, second, third = rows(tmp_path)[1:]
    counts = [[row[name] for row in (first, second, third)] for name in ("updates", "skipped_updates")]
    assert counts == [[2, 0, 1], [0, 2, 1]] and third["skipped_updates_total"] == 3
    assert "reward" not in second and "loss" not in second and math.isfinite(third["loss"])
    assert second["eval/dev/rail/mse"] == first["eval/dev/rail/mse"] != third["eval/dev/rail/mse"]
    assert second["tokens"] > 0 and None not in third.values()
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 3


def test_a_run_resumed_behind_a_skipped_update_is_the_run_that_was_not_stopped(task: Path, tmp_path: Path) -> None:
    config = tiny_config(task, tmp_path / "whole", checkpoint={"save_hf": True, "every": 2, "keep": 9}, steps=4)
    run_ranks(1, run_with_faults, config, {2: "loss"})
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole/checkpoints").rename(tmp_path / "cut/checkpoints")
    (tmp_path / "cut/checkpoints/step-000004").rename(tmp_path / "gone")
    run_ranks(1, train, config.with_overrides([f"output={tmp_path / 'cut'}"]))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")[1:]
    assert [row["skipped_updates_total"] for row in rows(tmp_path / "cut")] == [1, 1, 1]
