"""Rewards and their registry."""

import math

import pytest
import torch

from real_megatron.config import ObjectiveConfig
from real_megatron.errors import ConfigError
from real_megatron.objective import ResponseView, build_objective
from real_megatron.objective.rail import score_entropy
from real_megatron.objective.rewards import (
    LOGPROB_FLOOR,
    REWARDS,
    RewardOptions,
    below_the_worst,
    compute_rewards,
    find_reward,
    register_reward,
)

VALUES = torch.tensor([1.0, 2.0, 4.0])
LOGP = torch.tensor([[0.1, 0.2, 0.5]]).log()
ALL = torch.tensor([True])


def value(name: str, label: float, **options: object) -> float:
    settings = RewardOptions(**options)
    return float(compute_rewards(find_reward(name), LOGP, ALL, VALUES, torch.tensor([label]), settings))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(REWARDS, "_known", dict(REWARDS._known))


def test_values_by_hand() -> None:
    # ŷ = 2.5; log π, not π: at λ = 1 the second part is log 0.5, and log 0.2 for the label 2.
    assert value("real", 4.0) == pytest.approx(-2.25 + math.log(0.5))
    assert value("real", 2.0, lam=0.5) == pytest.approx(-0.25 + 0.5 * math.log(0.2))
    assert value("real", 4.0, lam=0.0) == pytest.approx(-2.25)
    assert value("real", 4.0, probabilities="renormalized") == pytest.approx(-((3.125 - 4) ** 2) + math.log(0.5))
    assert value("answer_logprob", 2.0) == pytest.approx(math.log(0.2))
    assert value("binary_expected", 2.0) == pytest.approx(0.2)
    assert (value("binary_greedy", 4.0), value("binary_greedy", 2.0)) == (1.0, 0.0)


def test_a_fractional_label_keeps_its_error_and_reads_the_nearest_score() -> None:
    assert value("real", 3.4) == pytest.approx(-0.81 + math.log(0.5))
    assert value("binary_expected", 2.9) == pytest.approx(0.2)
    assert value("binary_greedy", 3.4) == 1.0


def test_a_response_without_an_answer_gets_the_floor_and_nothing_of_its_row() -> None:
    logp = torch.tensor([[math.nan, math.inf, 0.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    has = torch.tensor([False, True])
    r = compute_rewards(find_reward("real"), logp, has, VALUES, torch.tensor([2.0, 2.0]), RewardOptions())
    assert r[0].item() == pytest.approx(-16.0 + LOGPROB_FLOOR)
    r.sum().backward()
    assert logp.grad is not None and logp.grad[0].tolist() == [0, 0, 0]
    assert torch.isfinite(logp.grad).all() and logp.grad[1].any()


@pytest.mark.parametrize(
    ("name", "options", "floor"),
    [
        # full probabilities: with all probability on other tokens ŷ is 0, so the worst error on 1..4 is 4, not 3
        ("real", {}, -16 + LOGPROB_FLOOR),
        ("real", {"probabilities": "renormalized"}, -9 + LOGPROB_FLOOR),
        ("real", {"lam": 0.0, "probabilities": "renormalized"}, -9),
        ("real", {"lam": 2.0}, -16 + 2 * LOGPROB_FLOOR),
        ("answer_logprob", {}, LOGPROB_FLOOR),
        ("binary_expected", {}, 0),
        ("binary_greedy", {}, 0),
    ],
)
def test_floors(name: str, options: dict, floor: float) -> None:
    none = torch.tensor([False])
    arguments = (find_reward(name), LOGP, none, VALUES, torch.tensor([2.0]), RewardOptions(**options))
    assert float(compute_rewards(*arguments)) == pytest.approx(floor)
    assert float(compute_rewards(*arguments, floor=-3.5)) == -3.5


def test_the_floor_of_negative_values_counts_zero_too() -> None:
    """With probability on other tokens than the scores −5..−1, ŷ reaches 0: the worst error is 5, else 4."""
    values = torch.arange(-5.0, 0.0)
    for probabilities, floor in (("full", -25.0), ("renormalized", -16.0)):
        options = RewardOptions(lam=0.0, probabilities=probabilities)
        assert float(find_reward("real").floor(values, options)) == floor


def test_the_binary_reward_is_that_of_the_sampled_score() -> None:
    """Score by score, a token that is no score, and a response without an answer; the distribution plays no part."""
    sampled, has = torch.tensor([0, 1, 2, -1, 1]), torch.tensor([True, True, True, True, False])
    labels = torch.tensor([2.0, 2.9, 4.0, 1.0, 2.0])
    logp = LOGP.expand(5, 3).clone().requires_grad_()
    arguments = (find_reward("binary"), logp, has, VALUES, labels, RewardOptions())
    r = compute_rewards(*arguments, sampled=sampled)
    assert r.tolist() == [0, 1, 1, 0, 0] and not r.requires_grad
    with pytest.raises(ValueError, match="needs sampled scores, but responses end at their anchor"):
        compute_rewards(*arguments)


def test_a_response_without_an_answer_is_below_the_worst_of_its_group() -> None:
    """By hand: margins from the worst answer, none from another group; a group without answers is left as it is."""
    r = torch.tensor([-1.0, -9.0, -3.0, -0.5, -9.0, -9.0, -9.0])
    has = torch.tensor([True, False, True, True, False, False, False])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert below_the_worst(r, has, group, 2.0).tolist() == [-1, -5, -3, -0.5, -2.5, -9, -9]
    assert below_the_worst(r[:0], has[:0], group[:0], 2.0).shape == (0,)


def test_margins() -> None:
    """real: the squared mean step of the scale, (4 - 1) / 2 here; answer_logprob: one nat; the binary rewards: none."""
    margins = {name: REWARDS[name].margin for name in ("real", "answer_logprob", "binary", "binary_expected")}
    found = {name: None if m is None else float(m(VALUES, RewardOptions())) for name, m in margins.items()}
    assert found == {"real": 2.25, "answer_logprob": 1.0, "binary": None, "binary_expected": None}


def test_no_valid_response_can_do_worse_than_the_squared_error_floor() -> None:
    g = torch.Generator().manual_seed(0)
    logp = torch.log_softmax(4 * torch.randn(500, 4, generator=g), -1)[:, :3]
    labels = 1 + 3 * torch.rand(500, generator=g)
    for probabilities in ("full", "renormalized"):
        options = RewardOptions(lam=0.0, probabilities=probabilities)
        r = compute_rewards(find_reward("real"), logp, torch.ones(500).bool(), VALUES, labels, options)
        floor = float(find_reward("real").floor(VALUES, options))
        assert floor <= r.min() < 0.8 * floor


def test_a_user_adds_a_reward(registry: None) -> None:
    @register_reward("confident", floor=-5.0)
    def confident(score_logprobs, values, labels, options):  # noqa: ANN001, ANN202
        return -score_entropy(score_logprobs)

    assert value("confident", 2.0) == pytest.approx(-float(score_entropy(LOGP)))


def test_a_reward_is_found_in_a_module_of_the_user() -> None:
    assert value("tests.support.extension_reward:ABSOLUTE", 4.0) == pytest.approx(-1.5)
    assert float(find_reward("tests.support.extension_reward:ABSOLUTE").floor(VALUES, RewardOptions())) == -3.0
    registered = find_reward("tests.support.extension_reward:brief_and_weighted")
    assert registered.reads_responses and registered is REWARDS["brief_and_weighted"]
    objective = build_objective(ObjectiveConfig(reward="tests.support.extension_reward:brief_and_weighted"))
    assert objective.reward is registered and objective.needs_responses
    assert not build_objective(ObjectiveConfig()).needs_responses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reel", "unknown reward 'reel'; known: .*binary.*real"),
        ("no.such.module:real", "module no.such.module cannot be imported"),
        ("tests.support.extension_reward:reel", "neither registers nor defines 'reel'"),
        ("tests.support.extension_reward:absolute", "is a function, not a Reward; register .* with @register_reward"),
    ],
)
def test_a_name_that_is_no_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^objective.reward: .*{message}"):
        find_reward(name)


def test_a_reward_that_reads_responses_gets_them_in_order() -> None:
    reward = find_reward("tests.support.extension_reward:brief_and_weighted")
    logp = LOGP.expand(3, 3).clone().requires_grad_()
    has, labels = torch.tensor([True, True, False]), torch.tensor([4.0, 2.0, 4.0])
    arguments = (reward, logp, has, VALUES, labels, RewardOptions())
    responses = [ResponseView("two words", {}), ResponseView("", {"weight": 3.0}), ResponseView("one", {"weight": 9.0})]
    r = compute_rewards(*arguments, responses=responses)
    # ŷ = 2.5: errors 1.5 and 0.5; two words; weight 3; no answer.
    assert r.tolist() == pytest.approx([-1.5 - 0.2, -3 * 0.5, -6.0])
    r.sum().backward()
    # d(−w |ŷ − y*|) / d log p_k = w · sign(y* − ŷ) · p_k v_k
    p_v = LOGP[0].exp() * VALUES
    torch.testing.assert_close(logp.grad, torch.stack([p_v, -3 * p_v, 0 * p_v]))


def test_a_reward_that_reads_responses_refuses_a_batch_without_them() -> None:
    reward = find_reward("tests.support.extension_reward:brief_and_weighted")
    labels = torch.tensor([2.0])
    with pytest.raises(ValueError, match="the reward reads responses, but the batch has none"):
        compute_rewards(reward, LOGP, ALL, VALUES, labels, RewardOptions())
    empty = compute_rewards(reward, LOGP[:0], ALL[:0], VALUES, labels[:0], RewardOptions())
    assert empty.shape == (0,)
