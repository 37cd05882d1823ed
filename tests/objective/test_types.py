"""Errors in a micro-batch are found and named before anything is computed from it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from real_megatron.objective import ResponseView, ScoredBatch

Batch = Callable[..., ScoredBatch]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["token_logprobs", "score_logprobs", "labels", "values", "old_logprobs", "ref_logprobs"]
)
def test_a_value_that_is_not_finite_is_refused_by_name_and_trajectory(batch: Batch, name: str, bad: float) -> None:
    scored = batch()
    tensor = getattr(scored, name).detach().clone()
    tensor[-1] = bad
    where = {"values": "scores \\[4\\]"}.get(name, "trajectories \\[[78]\\]")
    with pytest.raises(FloatingPointError, match=f"NaN or infinite values in {name} \\({where}\\)"):
        replace(scored, **{name: tensor}).validate()


def test_every_fault_is_in_the_one_error(batch: Batch) -> None:
    scored = batch()
    scored.labels[2:] = float("nan")
    scored.advantages = torch.full((9,), float("inf"))
    with pytest.raises(FloatingPointError, match=r"labels \(trajectories \[2, 3.*advantages \(trajectories \[0, 1, 2"):
        scored.validate()


def test_rows_without_an_answer_are_not_read(batch: Batch) -> None:
    scored = batch(invalid=(1, 4))
    scored.score_logprobs.data[[1, 4]] = float("nan")
    scored.validate()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("token_trajectory", (3,)), ("labels", (9, 1)), ("has_answer", (2,)), ("old_logprobs", (1,)), ("values", (4,))],
)
def test_shapes_that_disagree_are_refused(batch: Batch, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"ScoredBatch.{name} has shape"):
        replace(batch(), **{name: torch.zeros(shape)}).validate()


def test_responses_are_one_per_trajectory(batch: Batch) -> None:
    scored = batch()
    replace(scored, responses=[ResponseView("good", {})] * scored.size).validate()
    with pytest.raises(ValueError, match="ScoredBatch.responses has 8 entries for 9 trajectories"):
        replace(scored, responses=[ResponseView("good", {})] * 8).validate()
