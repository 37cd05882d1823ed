"""The same REAL run, whole loop included, at every parallel layout: the same rollouts, the same loss curve."""

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import rows, tiny_config, train, train_and_saved_metrics, write_tiny_task

LAYOUTS = [(2, {"tensor": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "pipeline": 2}), (2, {}), (2, {"context": 2})]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def one_rank(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    output = tmp_path_factory.mktemp("one")
    run_ranks(1, train, tiny_config(task, output))
    return rows(output)


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=["tp2", "pp2", "tp2pp2", "dp2", "cp2"])
def test_three_steps_are_the_same_at_every_layout(
    world: int, parallel: dict[str, int], task: Path, tmp_path: Path, one_rank: list[dict[str, float]]
) -> None:
    saved = run_ranks(world, train_and_saved_metrics, tiny_config(task, tmp_path, parallel=parallel))
    assert saved[0] and all(other == saved[0] for other in saved), "Megatron warns of checkpoints that differ"
    curve = rows(tmp_path)
    assert len(curve) == len(one_rank) == 3
    for step, expected in zip(curve, one_rank, strict=True):
        for name in ("loss", "loss_term2", "reward", "squared_error", "score_entropy"):
            # fp32 sums in another order: relative 1e-5, as the project promises.
            assert step[name] == pytest.approx(expected[name], rel=1e-5), name
        # Advantages are differences of larger rewards, Term 1 one of large sums, the norm a sum over all gradients.
        for name in ("advantage_std", "loss_term1", "grad_norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4), name
        for name in ("tokens", "rollout/response_tokens", "cot/distinct_2"):
            assert step[name] == expected[name], name


def test_the_run_is_not_trivial(one_rank: list[dict[str, float]]) -> None:
    assert all(step["grad_norm"] > 1e-2 and step["advantage_std"] > 1e-3 for step in one_rank)
    assert one_rank[0]["loss"] != one_rank[2]["loss"]


def test_every_step_measures_how_far_the_engine_is_from_the_policy(one_rank: list[dict[str, float]]) -> None:
    """Two implementations of one model in fp32, and weights that were synced right before."""
    assert all(0 < step["mismatch/mean"] <= step["mismatch/max"] < 1e-4 for step in one_rank)
