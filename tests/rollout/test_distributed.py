"""One engine for many ranks, in gloo worlds."""

import pytest

from tests.support import rollout_ranks as ranks
from tests.support.ranks import run_ranks


def test_embedded_engines_share_the_prompts_and_agree():
    """Seeded sampling: the ranks' common result is the one of a single process, token for token."""
    engine = ranks.TransformersEngine(ranks.tiny_qwen3(320), ranks.byte_level(), batch_size=64)
    engine.update_weights(ranks.model().named_parameters(), 5)
    alone = engine.generate(ranks.PROMPTS, ranks.PARAMS, ranks.SEEDS)
    (first, scores), *others = run_ranks(3, ranks.embedded)
    assert [[r.token_ids for r in g] for g in alone] == [[t for t, _, _ in g] for g in first]
    assert {version for group in first for _, _, version in group} == {5}
    exact = engine.branch_logprobs(ranks.PROMPTS, ranks.BRANCHES)
    # fp32; another batch shape sums in another order.
    for row, expected in zip(scores, exact.tolist(), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    assert all(other == (first, scores) for other in others)


def test_a_refused_prompt_has_the_same_index_on_every_rank():
    """In the whole call, not among the prompts of the rank that refused it."""
    results = run_ranks(2, ranks.refused, (4,))
    errors, groups = results[0]
    (first, generating, index), (second, scoring, index_scored) = errors
    assert (first, index, second, index_scored) == ("PromptRefused", 4, "PromptRefused", 4)
    assert "300 tokens; with 12 new ones" in generating and "300 tokens; with 0 new ones" in scoring
    assert len(groups) == len(ranks.PROMPTS) - 1
    assert results[1] == results[0]


def test_of_several_refused_prompts_the_first_is_named():
    """Rank 1 refuses the first of them, rank 0 the other."""
    for errors, _ in run_ranks(2, ranks.refused, (2, 5)):
        assert [index for _, _, index in errors] == [2, 2]


def test_a_failed_engine_counts_more_than_a_refused_prompt():
    """Otherwise one rank would go on without the prompt while the other ends."""
    (own, _), (other, _) = run_ranks(2, ranks.refused, (2, 3, 4, 5), (0,))
    assert [(kind, index) for kind, _, index in own + other] == [("EngineError", None)] * 4
    assert own[0][1].startswith("the engine sleeps")
    assert "failed on another rank: rank 0: EngineError: the engine sleeps" in other[0][1]


def test_followers_get_what_the_owner_got():
    results = run_ranks(3, ranks.owned)
    (groups, scores), log, _ = results[0]
    assert [g[0][0] for g in groups] == [[*p, s] for p, s in zip(ranks.PROMPTS, ranks.SEEDS, strict=True)]
    assert scores == [[-len(p) - 1.0, -len(p) - 2.0] for p in ranks.PROMPTS]
    assert all(result == results[0] for result in results) and len(log) > 5


@pytest.mark.parametrize(("fail", "message"), [("generate", "no server left"), ("update", "server refused")])
def test_an_error_of_the_owner_reaches_all_and_leaves_them_in_step(fail, message):
    results = run_ranks(3, ranks.owned, fail)
    names = [name for name, _ in ranks.model().named_parameters()]
    for result, log, total in results:
        assert message in result and total == 3
        # The collective export was iterated to its end everywhere.
        assert log == names
    assert "rank 0" in results[1][0]


def test_the_owner_is_rank_zero():
    assert all("every rank but the first" in message for message in run_ranks(2, ranks.misplaced))
