"""The parts of a reinforcement-learning step."""

from types import SimpleNamespace

import pytest
import torch

from real_megatron.batch.types import Group, Trajectory
from real_megatron.objective import ScoredBatch
from real_megatron.policy.policy import TrajectoryLogprobs
from real_megatron.scores import ScoreScale, ScoreTree
from real_megatron.training.rollouts import (
    PATIENCE,
    NothingToTrain,
    cot_metrics,
    steps_without_answer,
    trainable,
    with_policy_logprobs,
)
from real_megatron.training.samples import sample_rows
from real_megatron.training.update import mini_batches
from tests.support.policy_ranks import make_config, make_groups, write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.rollout_models import byte_level
from tests.support.training_ranks import two_updates


def group(*responses: list[int]) -> Group:
    return Group([1], [Trajectory(ids, len(ids) - 1) for ids in responses], label=1.0)


def test_groups_too_small_to_compare_are_left_out_and_none_left_is_an_error() -> None:
    groups = [group([1]), group([1], [2]), group()]
    assert trainable(groups, 2) == [groups[1]]
    with pytest.raises(NothingToTrain, match="none of the 2 prompts kept 2 responses"):
        trainable([groups[0], groups[2]], 2)


def test_a_run_ends_after_many_steps_in_a_row_without_an_answer() -> None:
    silent = [Group([1], [Trajectory([1, 2], None)] * 2, label=1.0)]
    count = 0.0
    for step in range(1, PATIENCE):
        count = steps_without_answer(silent, count)
        assert count == step
    with pytest.raises(NothingToTrain, match=f"no response of the last {PATIENCE} steps .* `real-megatron sft`"):
        steps_without_answer(silent, count)
    # Where the score is sampled, an anchor with another token behind it is no answer.
    anchored = [Group([1], [Trajectory([1, 2, 7], 1)], label=1.0)]
    answers, others = ScoreTree.of_tokens([6, 7]), ScoreTree.of_tokens([6, 8])
    assert steps_without_answer(anchored, 0.0) == steps_without_answer(anchored, 4.0, answers) == 0
    assert steps_without_answer(anchored, 0.0, others) == 1
    with pytest.raises(NothingToTrain, match="steps has a score anchor and a score, so that"):
        steps_without_answer(anchored, count, others)
    # Nor is the beginning of a score of several tokens.
    beginning, whole = ([Group([1], [Trajectory([1, 2, *score], 1)], label=1.0)] for score in ([7], [7, 8]))
    assert steps_without_answer(beginning, 0.0, ScoreTree([[[7, 8]], [[7, 9]]])) == 1
    assert steps_without_answer(whole, 0.0, ScoreTree([[[7, 8]], [[7, 9]]])) == 0
    # One answer in the batch starts the count again.
    assert steps_without_answer([*silent, group([1], [2])], count) == 0


def test_a_sample_shows_the_score_that_was_sampled() -> None:
    """All of its tokens; what is no score as it was written."""
    tokenizer = byte_level()
    scale = ScoreScale.resolve(tokenizer, ["1", "5", "10"], None, "[RESULT] ")
    groups = []
    for text in ("good [RESULT] 10", "good [RESULT] 1.", "good [RESULT] so"):
        ids = tokenizer.encode(text)
        trajectory = Trajectory(ids, scale.cut(tokenizer, ids) - 1, finish_reason="stop")
        groups.append(Group([1], [trajectory, Trajectory(ids[:2], None, finish_reason="eos")], label=1.0))
    scored = ScoredBatch(
        token_logprobs=torch.zeros(0),
        token_trajectory=torch.zeros(0, dtype=torch.long),
        score_logprobs=torch.zeros(6, 3).log_softmax(-1),
        has_answer=torch.ones(6, dtype=torch.bool),
        labels=torch.ones(6),
        group=torch.arange(6) // 2,
        values=torch.tensor(scale.values),
    )
    policy = SimpleNamespace(scored=lambda chosen: scored)
    objective = SimpleNamespace(
        rewards=lambda scored: torch.zeros(6),
        options=SimpleNamespace(probabilities="renormalized"),
        needs_sampled_scores=True,
    )
    rows = sample_rows(policy, tokenizer, scale, groups, objective)
    assert [row["answer"] for row in rows] == ["10", None, "1", None, " so", None]


def test_mini_batches_cover_the_batch_in_order_and_are_balanced() -> None:
    groups = make_groups(count=7)
    for count in (1, 2, 3, 7, 9):
        cut = mini_batches(groups, count)
        assert [g for part in cut for g in part] == groups
        assert len(cut) == min(count, 7) and max(map(len, cut)) - min(map(len, cut)) <= 1


def test_several_updates_are_several_steps(tmp_path) -> None:
    config = make_config(write_checkpoint(tmp_path), objective={"ratio": "truncated_is"}, batch={"mini_batches": 2})
    whole, steps = run_ranks(1, two_updates, config)[0]
    assert whole["loss"] == (steps[0]["loss"] + steps[1]["loss"]) / 2
    # The policy moves away from the sampler, so that the updates' largest differences differ.
    maxima = [step["mismatch/max"] for step in steps]
    assert maxima[0] != maxima[1] and whole["mismatch/max"] == max(maxima)
    for name in ("tokens", "information_tokens", "model_flops", "microbatches", "split_groups"):
        assert whole[name] == steps[0][name] + steps[1][name], name
    assert whole["updates"] == 2.0


def test_the_policys_log_probs_replace_the_engines_and_are_compared_with_them() -> None:
    """By hand: -1.5 and -2 of the policy against -1 and -2.25; the token without a loss has neither."""
    trajectory = Trajectory([1, 2, 3], 2, loss_mask=[True, False, True], old_logprobs=[-1.0, 0.0, -2.25])
    policy = SimpleNamespace(logprobs=lambda groups: [[TrajectoryLogprobs([-1.5, -2.0], None)] for _ in groups])
    groups, metrics = with_policy_logprobs(policy, [Group([1], [trajectory], label=1.0)])
    assert groups[0].trajectories[0].old_logprobs == [-1.5, 0.0, -2.0]
    assert metrics["mismatch/mean"] == (0.5 + 0.25) / 2 and metrics["mismatch/max"] == 0.5
    assert metrics["mismatch/kl_k1"] == (0.5 - 0.25) / 2


def test_copies_and_distinct_n_show_degeneration() -> None:
    varied = cot_metrics([group([1, 2, 3], [4, 5, 6])])
    copied = cot_metrics([group([1, 2, 3], [1, 2, 3])])
    assert varied["cot/copies"] == 0.0 and copied["cot/copies"] == 0.5
    thrice = cot_metrics([group([1, 2], [1, 2], [1, 2]), group([1, 2], [3, 4], [5, 6])])
    assert thrice["cot/copies"] == 2 / 6, "of three equal ones two are copies; equal ones of other prompts are none"
    assert varied["cot/distinct_2"] == 1.0 and copied["cot/distinct_2"] == 0.5


def test_a_sampled_score_is_no_part_of_the_cot() -> None:
    """Else copies with other scores would count as varied."""
    copies = [Trajectory([1, 2, 3, score], 2) for score in (7, 8)]
    assert cot_metrics([Group([1], copies, label=1.0)]) == cot_metrics([group([1, 2, 3], [1, 2, 3])])
