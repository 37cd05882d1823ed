"""The reference policy is the one the run started from, whatever training does."""

from pathlib import Path

import pytest

from real_megatron.batch.types import Trajectory
from real_megatron.training.reference import spread
from tests.support.policy_ranks import make_config, write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.training_ranks import reference_after_steps


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_reference_logprobs_are_those_of_the_start_and_the_weights_come_back(
    world: int, parallel: dict, tmp_path: Path
) -> None:
    config = make_config(write_checkpoint(tmp_path), parallel=parallel)
    for before, annotated, same in run_ranks(world, reference_after_steps, config):
        assert annotated == before  # the same weights through the same kernels: bit-identical
        assert same


def test_values_are_laid_out_over_the_tokens_that_carry_loss() -> None:
    trajectory = Trajectory([5, 6, 7, 8], 3, loss_mask=[True, False, True, False])
    assert spread(trajectory, [-1.0, -2.0]) == [-1.0, 0.0, -2.0, 0.0]
