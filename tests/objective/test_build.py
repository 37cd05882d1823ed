"""Configuration → objective, and the contradictions that are refused."""

import pytest

from real_megatron.config import ObjectiveConfig
from real_megatron.errors import ConfigError
from real_megatron.objective import build_objective, check
from real_megatron.objective.build import advice_on_lambda
from real_megatron.objective.reinforce import ReinforceObjective
from real_megatron.objective.rewards import REWARDS, RewardOptions
from real_megatron.objective.sft import SupervisedObjective


def test_the_default_is_the_papers_formula() -> None:
    want = ReinforceObjective(REWARDS["real"], RewardOptions(lam=1.0, probabilities="full"))
    assert build_objective(ObjectiveConfig()) == want
    assert (want.beta, want.term1, want.baseline, want.kl, want.ratio) == (1.0, True, "rloo", 0.0, "none")
    assert (want.std_normalize, want.clamp, want.token_mean) == (False, None, False)


def test_every_setting_arrives() -> None:
    settings = {"beta": 0.5, "term1": True, "baseline": "group_mean", "std_normalize": True, "clamp": 2.0}
    settings |= {"token_mean": True, "kl": 0.25, "ratio": "truncated_is", "clip": 0.125, "is_cap": 3.0}
    objective = build_objective(
        ObjectiveConfig(lam=0.75, is_level="sequence", no_anchor_reward=-4, **settings), "renormalized"
    )
    assert {name: getattr(objective, name) for name in settings} == settings
    assert (objective.is_level, objective.floor) == ("sequence", -4.0)
    assert objective.options == RewardOptions(lam=0.75, probabilities="renormalized")
    for name in ("sft", "raft"):
        assert build_objective(ObjectiveConfig(name=name), "renormalized").probabilities == "renormalized"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("rloo", ReinforceObjective(REWARDS["binary"])),
        ("jepo", ReinforceObjective(REWARDS["answer_logprob"])),
        ("grpo", ReinforceObjective(REWARDS["binary"], baseline="group_mean", std_normalize=True, ratio="ppo")),
        ("sft", SupervisedObjective(squared=0.0, lam=1.0)),
        ("raft", SupervisedObjective(squared=1.0, lam=1.0, score_nll=False)),
        ("tract", SupervisedObjective(squared=1.0, lam=1.0, score_nll=False)),
    ],
)
def test_the_name_chooses_defaults(name: str, want: object) -> None:
    config = ObjectiveConfig(name=name)
    assert build_objective(config) == want
    # a saved, resolved configuration builds the same objective
    assert build_objective(ObjectiveConfig(**config.model_dump())) == want


def test_what_is_given_wins_over_the_names_defaults() -> None:
    objective = build_objective(ObjectiveConfig(name="grpo", baseline="rloo", reward="binary_greedy"))
    assert (objective.baseline, objective.std_normalize) == ("rloo", True)
    assert objective.reward is REWARDS["binary_greedy"]


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective.reward: unknown reward 'reel'"):
        build_objective(ObjectiveConfig(reward="reel"))


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be learnt"):
        ObjectiveConfig(term1=False, beta=0.0)
    with pytest.raises(ValueError, match="sft has no other loss on the score"):
        ObjectiveConfig(name="sft", score_nll=False)


def test_several_updates_need_an_importance_ratio() -> None:
    with pytest.raises(ConfigError, match="batch.mini_batches is 12.*set objective.ratio to ppo or truncated_is"):
        check(ObjectiveConfig(), mini_batches=12, responses=8)
    for config in (ObjectiveConfig(ratio="truncated_is"), ObjectiveConfig(name="grpo"), ObjectiveConfig(name="sft")):
        check(config, mini_batches=12, responses=8)
    check(ObjectiveConfig(), mini_batches=1, responses=8)


def test_a_baseline_needs_responses_to_compare() -> None:
    normalised = ObjectiveConfig(baseline="none", std_normalize=True, beta=0)
    grouped = (ObjectiveConfig(), ObjectiveConfig(baseline="group_mean"), ObjectiveConfig(name="grpo"), normalised)
    for config in grouped:
        with pytest.raises(ConfigError, match="rollout.n is 1.*rollout.n to 2 or more"):
            check(config, mini_batches=1, responses=1)
    for config in (ObjectiveConfig(baseline="none"), ObjectiveConfig(term1=False), ObjectiveConfig(name="raft")):
        check(config, mini_batches=1, responses=1)


def test_a_normalised_term_1_and_a_term_2_do_not_add_up() -> None:
    """Term 2 would need the same 1/std to be part of any gradient."""
    both = [ObjectiveConfig(std_normalize=True), ObjectiveConfig(name="jepo", std_normalize=True)]
    both += [ObjectiveConfig(name="grpo", reward=reward) for reward in ("real", "binary_expected")]
    for config in both:
        with pytest.raises(ConfigError, match=f"std_normalize divides Term 1 .* reward {config.reward}: .*beta to 0"):
            check(config, mini_batches=1, responses=8)
        check(config.model_copy(update={"beta": 0.0}), mini_batches=1, responses=8)
        check(config.model_copy(update={"term1": False}), mini_batches=1, responses=8)
        check(config.model_copy(update={"std_normalize": False}), mini_batches=1, responses=8)
    for reward in ("binary", "binary_greedy"):
        check(ObjectiveConfig(name="grpo", reward=reward), mini_batches=1, responses=8)
    check(ObjectiveConfig(name="raft", std_normalize=True), mini_batches=1, responses=8)


def test_a_reward_without_a_gradient_needs_term_1() -> None:
    for reward in ("binary", "binary_greedy"):
        with pytest.raises(ConfigError, match=f"the reward {reward} has no gradient: nothing would be learnt"):
            check(ObjectiveConfig(reward=reward, term1=False), mini_batches=1, responses=8)
    check(ObjectiveConfig(reward="binary_expected", term1=False), mini_batches=1, responses=8)


@pytest.mark.parametrize(
    ("given", "values", "expected"),
    [
        ({}, [0, 100], "objective.lam=625"),
        ({"name": "raft"}, [0, 1], "objective.lam=0.0625"),
        ({}, [1, 5], None),
        ({}, [0, 9], None),
        ({"lam": 1.0}, [0, 100], None),
        ({"name": "sft"}, [0, 100], None),
        ({"name": "jepo"}, [0, 100], None),
        ({"name": "rloo"}, [0, 100], None),
    ],
)
def test_a_wide_scale_wants_another_lambda(given: dict, values: list[float], expected: str | None) -> None:
    advice = advice_on_lambda(ObjectiveConfig(**given), values)
    assert advice is None if expected is None else expected in (advice or "")


def test_a_sampled_score_and_aspects_do_not_go_together() -> None:
    for name in ("rloo", "grpo"):
        with pytest.raises(ConfigError, match="objective.reward binary needs a score that is sampled"):
            check(ObjectiveConfig(name=name), mini_batches=1, responses=8, aspects=2)
    check(ObjectiveConfig(name="rloo", reward="binary_expected"), mini_batches=1, responses=8, aspects=2)
    check(ObjectiveConfig(name="raft"), mini_batches=1, responses=8, aspects=2)
