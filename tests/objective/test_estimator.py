"""The gradient estimators against exact objectives, on a policy small enough to enumerate every CoT and every score.

The policy is a two-layer softmax network in float64. A CoT is up to three tokens; token 0 is the anchor and ends it; a
CoT of three other tokens is truncated and has no answer. A score is one token, or up to two: then token 0 is a score
that goes on to another, as 1 does to 10. The estimator's expectation is the exact sum over all K-tuples
of CoTs; the objective's gradient comes from central differences of J(θ) = Σ_c π(c) r(c), which share no code with the
package. Central differences at step 1e-5 are accurate to about 1e-9 here; the tolerances are 1e-7.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real_megatron.batch.score_logprobs import score_logprobs
from real_megatron.config import ObjectiveConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective
from real_megatron.objective.reinforce import ReinforceObjective
from real_megatron.scores import ScoreTree

COTS = [c for n in range(4) for c in itertools.product((1, 2), repeat=n)]
COTS = [(*c, 0) if len(c) < 3 else c for c in COTS]
VALUES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
LABEL, NEAREST = 3.6, 2
HIDDEN, COT_VOCABULARY, ANSWER_VOCABULARY = 4, 3, 4
"""The answer's vocabulary holds three tokens that scores are made of and one that probability leaks to."""
FEATURES = 11
SHAPES = [(FEATURES, HIDDEN), (HIDDEN, COT_VOCABULARY + ANSWER_VOCABULARY)]
ONE_TOKEN = ScoreTree.of_tokens([0, 1, 2])
TREES = {
    "one-token": ONE_TOKEN,
    "two-tokens": ScoreTree([[[0, 2]], [[1]], [[0]]]),
    "two-tokens-and-an-end": ScoreTree([[[0, 2]], [[1]], [[0]]], ends=[3]),
}
"""The label's score, the last, is in the latter two the one that could go on."""
LENGTHS = torch.tensor([len(c) for c in COTS])
TRAJECTORY = torch.repeat_interleave(torch.arange(len(COTS)), LENGTHS)
VALID = torch.tensor([c[-1] == 0 for c in COTS])
FLOOR = -7.0


def parameters(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(a * b for a, b in SHAPES), generator=g, dtype=torch.float64) * 0.7


def features(prefix: tuple[int, ...], score_begun: bool = False) -> Tensor:
    """Bias, one-hot tokens of the CoT by position, and whether token 0 of a score stands behind it."""
    x = torch.zeros(FEATURES, dtype=torch.float64)
    x[0] = 1
    for t, token in enumerate(prefix):
        x[1 + 3 * t + token] = 1
    x[-1] = score_begun
    return x


TOKEN_INPUTS = torch.stack([features(c[:t]) for c in COTS for t in range(len(c))])
ANSWER_INPUTS = torch.stack([features(c, score_begun) for c in COTS for score_begun in (False, True)])
TOKENS = torch.tensor([token for c in COTS for token in c])


def policy(theta: Tensor) -> tuple[Tensor, Tensor]:
    """log π of all CoTs' tokens, one after the other [N_tok], and of the answers [C, 8]: the token behind each CoT, and
    the one behind that where it is token 0."""
    w1, w2 = (p.view(shape) for p, shape in zip(theta.split([a * b for a, b in SHAPES]), SHAPES, strict=True))
    token_logits = torch.tanh(TOKEN_INPUTS @ w1) @ w2[:, :COT_VOCABULARY]
    answer_logits = torch.tanh(ANSWER_INPUTS @ w1) @ w2[:, COT_VOCABULARY:]
    log_p = torch.log_softmax(token_logits, -1).gather(1, TOKENS[:, None])[:, 0]
    return log_p, torch.log_softmax(answer_logits, -1).view(len(COTS), 2 * ANSWER_VOCABULARY)


def said(tree: ScoreTree, first: int, second: int) -> int | None:
    """The score that two tokens behind the anchor say, written out."""
    if tree is ONE_TOKEN:
        return first if first < 3 else None
    if first == 0:
        return 0 if second == 2 else 2 if not tree.ends or second == 3 else None
    return 1 if first == 1 else None


def scores(answers: Tensor, tree: ScoreTree = ONE_TOKEN) -> Tensor:
    """log π of the three scores [C, 3]: the sum over all pairs of tokens that say them."""
    p = torch.zeros(len(answers), 3, dtype=torch.float64)
    for first, second in itertools.product(range(ANSWER_VOCABULARY), repeat=2):
        score = said(tree, first, second)
        if score is not None:
            p[:, score] += (answers[:, first] + answers[:, ANSWER_VOCABULARY + second]).exp()
    return p.log()


def columns(tree: ScoreTree) -> list[int]:
    """Which of the answers' eight log-probs the branches of a tree ask for."""
    return [ANSWER_VOCABULARY * len(branch.path) + id for branch in tree.branches for id in branch.ids]


def cot_logprobs(token_logprobs: Tensor) -> Tensor:
    """log π(c) of every CoT [C]."""
    return torch.zeros(len(COTS), dtype=torch.float64).index_add(0, TRAJECTORY, token_logprobs)


def reward_real(log_pi: Tensor, lam: float, renormalized: bool) -> Tensor:
    p = log_pi.exp()
    q = p / p.sum(1, keepdim=True) if renormalized else p
    return -((q @ VALUES - LABEL) ** 2) + lam * log_pi[:, NEAREST]


def reward_binary_sampled(log_pi: Tensor) -> Tensor:
    """The 0/1 reward of a score that is sampled, summed over all scores that can be."""
    r = torch.zeros(len(COTS), dtype=torch.float64)
    for sampled in range(3):
        r = r + log_pi[:, sampled].exp() * float(sampled == NEAREST)
    return r


CASES: dict[str, tuple[dict, Callable[[Tensor], Tensor]]] = {
    "real": ({"lam": 1.0}, lambda a: reward_real(a, 1.0, False)),
    "real-renormalized": (
        {"lam": 0.3, "probabilities": "renormalized"},
        lambda a: reward_real(a, 0.3, True),
    ),
    "real-lambda0": ({"lam": 0.0}, lambda a: reward_real(a, 0.0, False)),
    "jepo": ({"name": "jepo"}, lambda a: a[:, NEAREST]),
    "rloo-integrated-out": ({"name": "rloo", "reward": "binary_expected"}, reward_binary_sampled),
}


def exact(
    theta: Tensor,
    reward: Callable[[Tensor], Tensor],
    frozen: Tensor | None = None,
    tree: ScoreTree = ONE_TOKEN,
) -> Tensor:
    """J(θ) = Σ_c π(c) r(c); with `frozen` the CoT probabilities stay fixed and only r depends on θ."""
    tokens, answers = policy(theta)
    r = torch.where(VALID, reward(scores(answers, tree)), FLOOR)
    p = cot_logprobs(tokens).exp() if frozen is None else frozen
    return (p * r).sum()


def central_differences(f: Callable[[Tensor], Tensor], theta: Tensor, step: float = 1e-5) -> Tensor:
    gradient = torch.zeros_like(theta)
    for i in range(theta.numel()):
        e = torch.zeros_like(theta)
        e[i] = step
        gradient[i] = (f(theta + e) - f(theta - e)) / (2 * step)
    return gradient


def tuples(k: int) -> Tensor:
    """[G, K]: every K-tuple of CoTs, one group each."""
    return torch.cartesian_prod(*[torch.arange(len(COTS))] * k).view(-1, k)


def batch_of(
    groups: Tensor, theta: Tensor, sampler: Tensor, tree: ScoreTree = ONE_TOKEN
) -> tuple[ScoredBatch, Tensor, Tensor]:
    """All groups as one micro-batch, the row of the policy's output behind each token row, and the log-probs that the
    tree's branches ask for."""
    tokens, answers = (x.detach() for x in policy(theta))
    old, _ = policy(sampler)
    cots = groups.flatten()
    starts = LENGTHS.cumsum(0) - LENGTHS
    lengths = LENGTHS[cots]
    first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rows = starts[cots].repeat_interleave(lengths) + torch.arange(int(lengths.sum())) - first
    asked = answers[cots][:, columns(tree)].requires_grad_()
    scored = ScoredBatch(
        token_logprobs=tokens[rows].requires_grad_(),
        token_trajectory=torch.repeat_interleave(torch.arange(len(cots)), lengths),
        score_logprobs=score_logprobs(tree, asked),
        has_answer=VALID[cots],
        labels=torch.full((len(cots),), LABEL, dtype=torch.float64),
        group=torch.arange(len(groups)).repeat_interleave(groups.shape[1]),
        values=VALUES,
        old_logprobs=old.detach()[rows],
    )
    return scored, rows, asked


def expected_gradient(
    objective: ReinforceObjective,
    theta: Tensor,
    k: int,
    sampler: Tensor | None = None,
    support: Tensor | None = None,
    tree: ScoreTree = ONE_TOKEN,
) -> Tensor:
    """E[∇ loss] over groups of K CoTs drawn from the sampler: the exact sum over all K-tuples."""
    sampler = theta if sampler is None else sampler
    groups = tuples(k)
    mu = cot_logprobs(policy(sampler)[0].detach()).exp()
    if support is not None:
        mu = mu * support / (mu * support).sum()
    scored, rows, asked = batch_of(groups, theta, sampler, tree)
    if support is not None:
        # The truncated sampler's own log-probabilities: the whole renormalisation on a CoT's first token.
        kept = (mu[groups.flatten()] > 0).double()
        total = (cot_logprobs(policy(sampler)[0].detach()).exp() * support).sum().log()
        starts = torch.cat([torch.ones(1, dtype=torch.bool), scored.token_trajectory.diff() > 0])
        scored = replace(scored, old_logprobs=scored.old_logprobs - total * starts)
        assert kept.sum() < kept.numel()
    loss, _ = objective(scored, Totals(len(groups), groups.numel(), len(rows)))
    d_tokens, d_asked = torch.autograd.grad(loss, (scored.token_logprobs, asked))
    # The loss is a mean over groups; what is wanted is the mean under their probabilities.
    weight = (mu[groups].prod(1) * len(groups)).repeat_interleave(k)
    per_row = torch.zeros(len(TOKENS), dtype=torch.float64).index_add(
        0, rows, d_tokens * weight[scored.token_trajectory]
    )
    per_answer = torch.zeros(len(COTS), 2 * ANSWER_VOCABULARY, dtype=torch.float64)
    per_answer.T[columns(tree)] = (
        torch.zeros(len(COTS), tree.width, dtype=torch.float64)
        .index_add(0, groups.flatten(), d_asked * weight[:, None])
        .T
    )
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(policy(leaf), leaf, (per_row, per_answer))[0]


def build(probabilities: str = "full", **settings: object) -> ReinforceObjective:
    return build_objective(ObjectiveConfig(**({"no_anchor_reward": FLOOR} | settings)), probabilities)


@pytest.fixture(scope="module")
def theta() -> Tensor:
    return parameters(1)


@pytest.fixture(scope="module")
def other() -> Tensor:
    """A sampler that differs from the policy."""
    return parameters(1) + 0.25 * parameters(2)


def test_every_cot_is_enumerated(theta: Tensor) -> None:
    assert len(COTS) == 15 and int(VALID.sum()) == 7
    torch.testing.assert_close(cot_logprobs(policy(theta)[0]).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


BY_TREE = pytest.mark.parametrize(
    ("scale", "k"), [("one-token", 2), ("one-token", 3), ("two-tokens", 2), ("two-tokens-and-an-end", 2)]
)


@BY_TREE
@pytest.mark.parametrize("case", CASES)
def test_the_mean_estimator_is_the_gradient_of_the_exact_objective(
    case: str, scale: str, k: int, theta: Tensor
) -> None:
    settings, reward = CASES[case]
    tree = TREES[scale]
    got = expected_gradient(build(**settings), theta, k, tree=tree)
    want = -central_differences(lambda t: exact(t, reward, tree=tree), theta)
    assert want.norm() > 1e-2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def actions(tree: ScoreTree) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    """Every response of a sampled score: its CoT [A], the tokens sampled behind it, up to the one that decides the
    score, and the score that they say [A], -1 where there is none."""
    goes_on = [] if tree is ONE_TOKEN else [0]
    paths = [(first,) for first in range(ANSWER_VOCABULARY) if first not in goes_on]
    paths += [(first, second) for first in goes_on for second in range(ANSWER_VOCABULARY)]
    pairs = [(c, path) for c in range(len(COTS)) for path in (paths if VALID[c] else [()])]
    found = [said(tree, path[0], path[-1]) if path else None for _, path in pairs]
    for (_, path), score in zip(pairs, found, strict=True):
        assert not path or tree.read(path) == (score, len(path)), "sampling reads and ends responses the same"
    score = torch.tensor([-1 if score is None else score for score in found])
    return torch.tensor([c for c, _ in pairs]), [path for _, path in pairs], score


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@BY_TREE
def test_rloo_has_the_gradient_of_its_0_1_reward_over_cot_and_sampled_score(
    scale: str, k: int, off_policy: bool, theta: Tensor, other: Tensor
) -> None:
    """The exact sum over all K-tuples of (CoT, score) against the gradient of J = E 1[y = y*], every token of the score
    an action like any other, also the one that ends it: 36 or 57 responses, with scores, tokens that are none, and
    truncated CoTs. Central differences, 1e-7."""
    tree = TREES[scale]
    settings = {"ratio": "truncated_is", "is_level": "sequence", "is_cap": 1e9} if off_policy else {}
    objective = build(name="rloo", no_anchor_reward=None, **settings)
    assert objective.needs_sampled_scores and not objective.floor
    cot, behind, score = actions(tree)
    groups = torch.cartesian_prod(*[torch.arange(len(cot))] * k)
    flat = groups.flatten()

    def rows(tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probs of each action's tokens, score included, and the action of each."""
        values, owner = [], []
        for a, (c, path) in enumerate(zip(cot.tolist(), behind, strict=True)):
            places = [ANSWER_VOCABULARY * t + token for t, token in enumerate(path)]
            own = torch.cat([tokens[c == TRAJECTORY], answers[c, places]])
            values.append(own)
            owner += [a] * len(own)
        return torch.cat(values), torch.tensor(owner)

    sampler = other if off_policy else theta
    leaf = theta.clone().requires_grad_()
    tokens, answers = policy(leaf)
    logp, owner = rows(tokens, answers)
    old, _ = rows(*policy(sampler))
    mu = torch.zeros(len(cot), dtype=torch.float64).index_add(0, owner, old).exp()
    torch.testing.assert_close(mu.sum(), torch.ones((), dtype=torch.float64))

    # One row per token of every response of every group.
    lengths = owner.bincount(minlength=len(cot))
    starts = lengths.cumsum(0) - lengths
    counts = lengths[flat]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = starts[flat].repeat_interleave(counts) + torch.arange(int(counts.sum())) - first
    token_logprobs = logp.detach()[index].requires_grad_()
    distribution = scores(answers.detach(), tree)[cot[flat]].requires_grad_()
    scored = ScoredBatch(
        token_logprobs=token_logprobs,
        token_trajectory=torch.arange(len(flat)).repeat_interleave(counts),
        score_logprobs=distribution,
        has_answer=VALID[cot[flat]],
        labels=torch.full((len(flat),), LABEL, dtype=torch.float64),
        group=torch.arange(len(groups)).repeat_interleave(k),
        values=VALUES,
        old_logprobs=old.detach()[index],
        sampled=score[flat],
    )
    loss, _ = objective(scored, Totals(len(groups), len(flat), len(index)))
    d_tokens, d_scores = torch.autograd.grad(loss, (token_logprobs, distribution))
    assert not d_scores.any(), "the score is trained as a token, not through its distribution"
    weight = (mu.detach()[groups].prod(1) * len(groups)).repeat_interleave(k)
    per_row = torch.zeros(len(logp), dtype=torch.float64).index_add(
        0, index, d_tokens * weight[scored.token_trajectory]
    )
    (got,) = torch.autograd.grad(logp, leaf, per_row)

    def exact_objective(t: Tensor) -> Tensor:
        tokens, answers = policy(t)
        return (cot_logprobs(tokens).exp() * VALID * reward_binary_sampled(scores(answers, tree))).sum()

    want = -central_differences(exact_objective, theta)
    assert want.norm() > 1e-2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_a_single_response_without_baseline_is_unbiased_too(theta: Tensor) -> None:
    settings, reward = CASES["real"]
    got = expected_gradient(build(baseline="none", **settings), theta, 1)
    want = -central_differences(lambda t: exact(t, reward), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("case", ["real", "jepo"])
def test_beta_adds_its_excess_times_the_mean_reward_gradient(case: str, beta: float, theta: Tensor) -> None:
    settings, reward = CASES[case]
    got = expected_gradient(build(beta=beta, **settings), theta, 2)
    exact_gradient = -central_differences(lambda t: exact(t, reward), theta)
    frozen = cot_logprobs(policy(theta)[0]).exp()
    reward_gradient = -central_differences(lambda t: exact(t, reward, frozen), theta)
    assert ((beta - 1) * reward_gradient).norm() > 1e-2
    torch.testing.assert_close(got - exact_gradient, (beta - 1) * reward_gradient, rtol=0, atol=1e-7)


def test_without_term_1_only_the_mean_reward_gradient_is_left(theta: Tensor) -> None:
    settings, reward = CASES["real"]
    got = expected_gradient(build(term1=False, beta=0.7, **settings), theta, 2)
    frozen = cot_logprobs(policy(theta)[0]).exp()
    want = -0.7 * central_differences(lambda t: exact(t, reward, frozen), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("k", [2, 3])
def test_the_group_mean_baseline_shrinks_term_1_by_its_own_fraction(k: int, theta: Tensor) -> None:
    """r_i is part of its own baseline, so Term 1 is (K−1)/K of the unbiased one."""
    settings, reward = CASES["real"]
    got = expected_gradient(build(baseline="group_mean", beta=0.0, **settings), theta, k)
    full = -central_differences(lambda t: exact(t, reward), theta)
    frozen = cot_logprobs(policy(theta)[0]).exp()
    term2 = -central_differences(lambda t: exact(t, reward, frozen), theta)
    torch.testing.assert_close(got, (k - 1) / k * (full - term2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("k", [2, 3])
def test_importance_weights_make_off_policy_samples_unbiased(k: int, theta: Tensor, other: Tensor) -> None:
    settings, reward = CASES["real"]
    want = -central_differences(lambda t: exact(t, reward), theta)
    got = expected_gradient(
        build(ratio="truncated_is", is_level="sequence", is_cap=1e9, **settings), theta, k, sampler=other
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    # Three variants that stay biased, so that the comparison above can fail.
    for variant in ({"ratio": "none"}, {"ratio": "truncated_is", "is_level": "sequence", "is_cap": 0.8}):
        biased = expected_gradient(build(**variant, **settings), theta, k, sampler=other)
        assert (biased - want).norm() > 1e-2
    token = build(ratio="truncated_is", is_level="token", is_cap=1e9, **settings)
    assert (expected_gradient(token, theta, k, sampler=other) - want).norm() > 1e-2


def test_weights_under_nucleus_sampling_give_the_gradient_over_its_support(theta: Tensor) -> None:
    """Top-p never draws some CoTs, and no weight brings them back: the gradient is that of Σ_{c in support} π(c) r(c);
    a baseline b, whose mean is no longer zero there, adds that of −b Σ_{c in support} π(c)."""
    settings, reward = CASES["real"]
    probabilities = cot_logprobs(policy(theta)[0]).exp()
    support = (probabilities > probabilities.median()).double()

    def over_support(t: Tensor, baseline: Tensor | float) -> Tensor:
        tokens, answers = policy(t)
        r = torch.where(VALID, reward(scores(answers)), FLOOR)
        return (support * cot_logprobs(tokens).exp() * (r - baseline)).sum()

    weighted = {"ratio": "truncated_is", "is_level": "sequence", "is_cap": 1e9}
    got = expected_gradient(build(baseline="none", **weighted, **settings), theta, 2, support=support)
    want = -central_differences(lambda t: over_support(t, 0.0), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)

    r = torch.where(VALID, reward(scores(policy(theta)[1])), FLOOR)
    mean_reward = (support * probabilities * r).sum() / (support * probabilities).sum()
    got = expected_gradient(build(**weighted, **settings), theta, 2, support=support)
    want = -central_differences(lambda t: over_support(t, mean_reward), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_on_policy_ppo_is_the_plain_gradient(theta: Tensor) -> None:
    settings, reward = CASES["real"]
    got = expected_gradient(build(ratio="ppo", **settings), theta, 2)
    want = -central_differences(lambda t: exact(t, reward), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_the_kl_term_has_the_value_of_the_reverse_and_the_gradient_of_the_forward_divergence(
    theta: Tensor, other: Tensor
) -> None:
    """Per next-token distribution, prefixes drawn from the policy: E k3 = KL(π‖q), E ∇k3 = ∇KL(q‖π)."""
    log_pi, log_q = policy(theta)[0].detach(), policy(other)[0].detach()
    weight = cot_logprobs(log_pi).exp()[TRAJECTORY]
    objective = build(term1=False, kl=1.0, lam=0.0)
    scored, rows, _ = batch_of(torch.arange(len(COTS))[:, None], theta, theta)
    scored = replace(scored, ref_logprobs=log_q[rows])
    loss, metrics = objective(scored, Totals(1, 1, 1))
    (d_tokens,) = torch.autograd.grad(loss, scored.token_logprobs)
    leaf = theta.clone().requires_grad_()
    (got,) = torch.autograd.grad(policy(leaf)[0], leaf, d_tokens * weight)

    prefixes = sorted({c[:t] for c in COTS for t in range(len(c))})
    inputs = torch.stack([features(p) for p in prefixes])
    reach = torch.stack(
        [sum((cot_logprobs(log_pi).exp()[i] for i, c in enumerate(COTS) if c[: len(p)] == p)) for p in prefixes]
    )

    def divergence(t: Tensor, forward: bool) -> Tensor:
        def log_softmax(parameters: Tensor) -> Tensor:
            w1, w2 = (p.view(s) for p, s in zip(parameters.split([a * b for a, b in SHAPES]), SHAPES, strict=True))
            return torch.log_softmax(torch.tanh(inputs @ w1) @ w2[:, :COT_VOCABULARY], -1)

        p, q = log_softmax(t), log_softmax(other)
        a, b = (q, p) if forward else (p, q)
        return (reach[:, None] * a.exp() * (a - b)).sum()

    torch.testing.assert_close(got, central_differences(lambda t: divergence(t, True), theta), rtol=0, atol=1e-7)
    k3 = (log_q - log_pi).exp() - 1 - (log_q - log_pi)
    torch.testing.assert_close((weight * k3).sum(), divergence(theta, False), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["kl"][0], k3.sum(), rtol=1e-10, atol=0)


def term1_samples(objective: ReinforceObjective, theta: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Term 1's gradient [G, P] for every K-tuple, the tuples' probabilities [G], and the advantages [G, K]."""
    groups = tuples(k)
    tokens = policy(theta)[0].detach()
    probability = cot_logprobs(tokens).exp()[groups].prod(1)
    scored, _, _ = batch_of(groups, theta, theta)
    loss, _ = objective(scored, Totals(len(groups), groups.numel(), 1))
    (d_tokens,) = torch.autograd.grad(loss, scored.token_logprobs)
    first = torch.cat([torch.ones(1, dtype=torch.bool), scored.token_trajectory.diff() > 0])
    coefficient = d_tokens[first].view(groups.shape) * len(groups)
    gradient = (coefficient[:, :, None] * scores_of_cots(theta)[groups]).sum(1)
    return gradient, probability, -coefficient * k


def scores_of_cots(theta: Tensor) -> Tensor:
    """s_c = ∇ log π(c), [C, P]."""
    return torch.autograd.functional.jacobian(lambda t: cot_logprobs(policy(t)[0]), theta)


def total_variance(samples: Tensor, probability: Tensor) -> Tensor:
    mean = probability @ samples
    return (probability * ((samples - mean) ** 2).sum(-1)).sum()


@pytest.mark.parametrize("k", [2, 3])
def test_rloo_has_zero_mean_no_bias_and_the_variance_of_theory(k: int, theta: Tensor) -> None:
    """Term 1 with RLOO is the U-statistic of the covariance kernel h(c, c') = ½ (r − r')(s − s'), so (Hoeffding 1948)
    its variance is [4 (K−2) Var h₁ + 2 Var h] / (K (K−1)) with h₁(c) = E h(c, c'); without baseline it is Var(r s) / K.
    Everything is an exact sum in float64: tolerance 1e-10."""
    settings, reward = CASES["real"]
    r = torch.where(VALID, reward(scores(policy(theta)[1])), FLOOR)
    s, p = scores_of_cots(theta), cot_logprobs(policy(theta)[0]).exp()

    with_rloo, probability, advantages = term1_samples(build(beta=0.0, **settings), theta, k)
    without, _, _ = term1_samples(build(beta=0.0, baseline="none", **settings), theta, k)

    assert advantages.sum(1).abs().max() < 1e-10
    torch.testing.assert_close(probability @ with_rloo, probability @ without, rtol=0, atol=1e-10)
    # The baseline alone, mean_{j≠i} r_j, adds nothing: advantage minus reward, times s, has mean zero.
    baseline = r[tuples(k)] - advantages
    added = (probability[:, None] * (baseline[:, :, None] * s[tuples(k)]).mean(1)).sum(0)
    assert added.abs().max() < 1e-10

    h = 0.5 * (r[:, None] - r)[:, :, None] * (s[:, None] - s)
    h1 = torch.einsum("d,cdp->cp", p, h)
    pairs = (p[:, None] * p).flatten()
    zeta1, zeta2 = total_variance(h1, p), total_variance(h.flatten(0, 1), pairs)
    theory = (4 * (k - 2) * zeta1 + 2 * zeta2) / (k * (k - 1))
    theory_without = total_variance(r[:, None] * s, p) / k
    torch.testing.assert_close(total_variance(with_rloo, probability), theory, rtol=1e-10, atol=0)
    torch.testing.assert_close(total_variance(without, probability), theory_without, rtol=1e-10, atol=0)
    assert theory < 0.5 * theory_without
