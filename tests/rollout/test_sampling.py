"""Responses become trajectories: the cut, the three rules, and counts that add up."""

import pytest

from real_megatron.errors import EngineError
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.sampling import sample_trajectories
from tests.support.rollout_fakes import DecodingScale, ScriptedEngine
from tests.support.rollout_models import byte_level

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
ANCHOR = "[RESULT]"
SCALE = DecodingScale(ANCHOR, TOKENIZER.encode(ANCHOR))
PARAMS = SamplingParams(n=2, max_new_tokens=30, stop=("ignored",))


def response(text: str, reason: str, tail: tuple[int, ...] = ()) -> Response:
    ids = TOKENIZER.encode(text) + list(tail)
    return Response(ids, [-0.5 - i for i in range(len(ids))], reason, weight_version=3)


RESPONSES = [
    [response("good [RESULT]", "stop"), response("never ends", "length")],
    [response("over", "eos", (EOS,)), response("bad [RESULT]", "stop")],
    [response("no", "length"), response("none", "length")],
]
PROMPTS = [[1], [2], [3]]


def sample(rule):
    engine = ScriptedEngine(RESPONSES)
    return engine, sample_trajectories(engine, TOKENIZER, SCALE, PROMPTS, PARAMS, rule, seeds=[4, 5, 6])


def test_engine_is_asked_to_stop_at_the_anchor():
    engine, _ = sample("penalize")
    prompts, params, seeds = engine.asked[0]
    assert (prompts, params.stop, params.n, seeds) == (PROMPTS, (ANCHOR,), 2, [4, 5, 6])


def test_answered_trajectory_ends_with_the_anchor():
    _, sampled = sample("penalize")
    trajectory = sampled.trajectories[0][0]
    source = RESPONSES[0][0]
    assert trajectory.response_ids == source.token_ids and trajectory.old_logprobs == source.logprobs
    assert TOKENIZER.decode(trajectory.response_ids[: trajectory.answer_index + 1]).endswith(ANCHOR)
    assert all(trajectory.loss_mask) and not trajectory.forced_anchor
    assert (trajectory.finish_reason, trajectory.weight_version) == ("stop", 3)


def test_tokens_behind_the_anchor_are_cut():
    engine = ScriptedEngine([[response("a [RESULT] 4 and more", "stop"), response("b [RESULT] 1", "length")]])
    (group,) = sample_trajectories(engine, TOKENIZER, SCALE, [[1]], PARAMS).trajectories
    for trajectory in group:
        assert TOKENIZER.decode(trajectory.response_ids).endswith(ANCHOR)
        assert len(trajectory.response_ids) == len(trajectory.old_logprobs) == trajectory.answer_index + 1
        assert trajectory.finish_reason == "stop"


def test_penalize_keeps_the_response_without_an_answer():
    _, sampled = sample("penalize")
    assert [len(g) for g in sampled.trajectories] == [2, 2, 2]
    long, ended = sampled.trajectories[0][1], sampled.trajectories[1][0]
    assert (long.answer_index, long.finish_reason) == (None, "length")
    assert (ended.answer_index, ended.finish_reason) == (None, "eos")
    assert ended.response_ids[-1] == EOS and all(ended.loss_mask)
    metrics = sampled.metrics
    assert (metrics["no_anchor"], metrics["truncated"]) == (4 / 6, 3 / 6)
    assert (metrics["forced"], metrics["dropped"], metrics["empty_groups"]) == (0, 0, 0)
    lengths = [len(r.token_ids) for g in RESPONSES for r in g]
    assert metrics["response_tokens"] == sum(lengths) / 6 and metrics["response_tokens_max"] == max(lengths)


def test_force_appends_the_anchor_without_loss():
    _, sampled = sample("force")
    for trajectory, source in (
        (sampled.trajectories[0][1], RESPONSES[0][1]),
        (sampled.trajectories[1][0], RESPONSES[1][0]),
    ):
        kept = len(source.token_ids) - (source.finish_reason == "eos")
        assert trajectory.response_ids == source.token_ids[:kept] + SCALE.anchor_ids
        assert trajectory.loss_mask == [True] * kept + [False] * len(SCALE.anchor_ids)
        assert trajectory.old_logprobs[:kept] == source.logprobs[:kept]
        assert len(trajectory.old_logprobs) == len(trajectory.response_ids)
        assert trajectory.answer_index == len(trajectory.response_ids) - 1 and trajectory.forced_anchor
    assert not sampled.trajectories[0][0].forced_anchor
    assert sampled.metrics["forced"] == 4 / 6


@pytest.mark.parametrize(("more", "own"), [(25, 5), (4, 4), (0, 0), (-1, 0)])
def test_a_response_with_a_forced_anchor_is_no_longer_than_any_other(more, own):
    """Engines have room for a prompt and `max_new_tokens`, and the second pass reads the score behind the anchor."""
    ended, anchor = Response([7, 7, 7, 7, 7, EOS], [-1.0] * 6, "eos", 0), SCALE.anchor_ids
    longest = len(anchor) + more
    for source in (ended, Response([7] * 5, [-1.0] * 5, "length", 0)):
        params = SamplingParams(n=1, max_new_tokens=longest)
        sampled = sample_trajectories(ScriptedEngine([[source]]), TOKENIZER, SCALE, [[1]], params, "force")
        trajectory = sampled.trajectories[0][0]
        assert trajectory.response_ids == [7] * own + anchor
        assert trajectory.loss_mask == [True] * own + [False] * len(anchor)
        assert len(trajectory.old_logprobs) == own + len(anchor)


def test_drop_counts_what_it_leaves_out():
    _, sampled = sample("drop")
    assert [len(g) for g in sampled.trajectories] == [1, 1, 0]
    assert (sampled.metrics["dropped"], sampled.metrics["empty_groups"]) == (4 / 6, 1)


def test_anchor_inside_a_token_is_no_anchor():
    scale = DecodingScale("[RES", TOKENIZER.encode("[RES"))
    joined = next(i for i in range(len(TOKENIZER)) if TOKENIZER.decode([i]).endswith("RESULT"))
    ids = TOKENIZER.encode("a [")[:2] + [joined]
    engine = ScriptedEngine([[Response(ids, [-1.0] * len(ids), "stop", 0)] * 2])
    assert "[RES" in TOKENIZER.decode(ids)
    sampled = sample_trajectories(engine, TOKENIZER, scale, [[1]], PARAMS)
    assert sampled.trajectories[0][0].answer_index is None
    assert (sampled.metrics["split_anchor"], sampled.metrics["no_anchor"]) == (1, 1)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (RESPONSES[:2], "2 groups for 3 prompts"),
        ([RESPONSES[0][:1], *RESPONSES[1:]], "1 responses for prompt 0, asked for 2"),
        ([*RESPONSES[:2], [Response([1, 2], [-0.1], "stop", 0)] * 2], "2 tokens with 1 log-probabilities for prompt 2"),
        ([*RESPONSES[:2], [Response([], [], "stop", 0)] * 2], "0 tokens"),
    ],
)
def test_incomplete_answers_are_errors(responses, message):
    with pytest.raises(EngineError, match=message):
        sample_trajectories(ScriptedEngine(responses), TOKENIZER, SCALE, PROMPTS, PARAMS)


def test_unknown_rule():
    with pytest.raises(ValueError, match="use one of penalize, force, drop"):
        sample("ignore")
