"""The score as one more sampled token: behind the model's anchor and behind a forced one, with every engine."""

import pytest
import torch

from real_megatron.errors import PromptRefused
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.scores import Branch, ScoreScale
from tests.support.rollout_fakes import ScriptedEngine, anchoring_engine
from tests.support.rollout_models import byte_level

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
SCALE = ScoreScale.resolve(TOKENIZER, ["1", "4", "5"], None, "[RESULT] ")
ANCHOR, FOUR = SCALE.anchor_ids, SCALE.score_ids[1]
PROMPTS = [[1], [2], [3]]
TO_FOURTEEN = ["1", "4", "5", "10", "14"]
TREE_SCALE = ScoreScale.resolve(TOKENIZER, TO_FOURTEEN, None, "[RESULT] ")
ENDED_SCALE = ScoreScale.resolve(TOKENIZER, TO_FOURTEEN, None, "[RESULT] ", ends=["eos"])
ONE, ZERO = TREE_SCALE.tree.paths[3]


def response(text: str, reason: str, tail: tuple[int, ...] = ()) -> Response:
    ids = TOKENIZER.encode(text) + list(tail)
    return Response(ids, [-0.5 - i for i in range(len(ids))], reason, weight_version=3)


RESPONSES = [
    [response("good [RESULT] 4", "stop"), response("so [RESULT] the end is far", "length")],
    [response("ended [RESULT]", "eos", (EOS,)), response("no room for a score [RESULT]", "length")],
    [response("no anchor", "eos", (EOS,)), response("cut off here", "length")],
]
BEHIND = [[Response([token], [-9.0 - i], "length", weight_version=2)] for i, token in enumerate([FOUR, 7, EOS])]
LONGEST = len(RESPONSES[1][1].token_ids)
PARAMS = SamplingParams(n=2, temperature=0.7, max_new_tokens=LONGEST)


class TwoRequests(ScriptedEngine):
    """Answers a request for one token behind forced anchors with BEHIND."""

    def generate(self, prompts, params, seeds=None):
        found = super().generate(prompts, params, seeds)
        return found if len(self.asked) == 1 else BEHIND


def sample(rule, seeds=(40, 50, 60)):
    engine = TwoRequests(RESPONSES)
    sampled = sample_trajectories(engine, TOKENIZER, SCALE, PROMPTS, PARAMS, rule, seeds, score=True)
    return engine, sampled


def test_the_token_behind_the_anchor_is_an_action_like_any_other():
    """A score, another token, the end of the sequence: whatever was sampled, with its log-prob; nothing behind it."""
    engine, sampled = sample("penalize")
    assert len(engine.asked) == 1 and engine.asked[0][1].stop == ("[RESULT] 1", "[RESULT] 4", "[RESULT] 5")
    for i, k, token in ((0, 0, FOUR), (0, 1, TOKENIZER.encode(" the")[0]), (1, 0, EOS)):
        trajectory, source = sampled.trajectories[i][k], RESPONSES[i][k]
        length = trajectory.answer_index + 2
        assert TOKENIZER.decode(trajectory.response_ids[:-1]).endswith("[RESULT]")
        assert trajectory.response_ids == source.token_ids[:length] and trajectory.response_ids[-1] == token
        assert trajectory.old_logprobs == source.logprobs[:length] and trajectory.loss_mask == [True] * length
        assert trajectory.finish_reason == "stop" and not trajectory.forced_anchor
    for i, k in ((1, 1), (2, 0), (2, 1)):
        trajectory = sampled.trajectories[i][k]
        assert trajectory.answer_index is None and trajectory.response_ids == RESPONSES[i][k].token_ids
    # Of the three answered ones two have no score behind the anchor; without room for a score there is no answer.
    metrics = sampled.metrics
    assert (metrics["off_scale"], metrics["no_anchor"], metrics["truncated"]) == (2 / 6, 3 / 6, 2 / 6)


def test_without_sampled_scores_nothing_is_off_the_scale():
    sampled = sample_trajectories(ScriptedEngine(RESPONSES), TOKENIZER, SCALE, PROMPTS, PARAMS)
    assert "off_scale" not in sampled.metrics
    assert sampled.trajectories[1][1].response_ids == RESPONSES[1][1].token_ids  # room for a score is not needed


def test_drop_leaves_out_what_has_no_score():
    _, sampled = sample("drop")
    assert [len(group) for group in sampled.trajectories] == [2, 1, 0]
    assert (sampled.metrics["dropped"], sampled.metrics["off_scale"]) == (3 / 6, 2 / 6)


def test_a_score_is_sampled_behind_every_forced_anchor():
    engine, sampled = sample("force")
    forced = [(1, 1, BEHIND[0][0]), (2, 0, BEHIND[1][0]), (2, 1, BEHIND[2][0])]
    sequences, params, seeds = engine.asked[1]
    assert (params.n, params.max_new_tokens, params.stop, params.temperature) == (1, 1, (), 0.7)
    for place, (i, k, behind) in enumerate(forced):
        trajectory, source = sampled.trajectories[i][k], RESPONSES[i][k]
        own = min(len(source.token_ids) - (source.finish_reason == "eos"), LONGEST - len(ANCHOR) - 1)
        assert trajectory.response_ids == [*source.token_ids[:own], *ANCHOR, *behind.token_ids]
        assert len(trajectory.response_ids) <= LONGEST
        assert trajectory.loss_mask == [True] * own + [False] * len(ANCHOR) + [True]
        assert trajectory.old_logprobs[:own] == source.logprobs[:own]
        assert trajectory.old_logprobs[-1] == behind.logprobs[0]
        assert len(trajectory.old_logprobs) == len(trajectory.response_ids)
        assert trajectory.answer_index == len(trajectory.response_ids) - 2
        assert trajectory.forced_anchor and trajectory.weight_version == 2
        assert sequences[place] == PROMPTS[i] + trajectory.response_ids[:-1]
    # No seed of the first request's samples, and no seed twice.
    assert seeds == [53, 62, 63]
    assert (sampled.metrics["off_scale"], sampled.metrics["forced"]) == (4 / 6, 3 / 6)
    assert sample("force", None)[0].asked[1][2] is None


def test_a_refusal_behind_a_forced_anchor_names_its_prompt():
    class Refusing(ScriptedEngine):
        def generate(self, prompts, params, seeds=None):
            if params.n == 1:
                raise PromptRefused(1, "too long")
            return self.responses

    with pytest.raises(PromptRefused, match="too long") as refused:
        sample_trajectories(Refusing(RESPONSES), TOKENIZER, SCALE, PROMPTS, PARAMS, "force", score=True)
    assert refused.value.index == 2


@pytest.mark.parametrize(
    "scale, scores",
    [(TREE_SCALE, [3, 0, 1, None, 0, 3]), (ENDED_SCALE, [3, None, 1, None, 0, 3])],
    ids=["any end", "end of sequence"],
)
def test_every_token_of_a_score_up_to_the_one_that_decides_is_an_action(scale, scores):
    """Behind own and forced anchors: two digits; one digit and what ends it; a digit that nothing continues; no score.
    What an engine samples behind that is no part of the response."""
    reached = [response("good [RESULT]", "stop"), response("so it is [RESULT]", "stop")]
    first = [reached, [response("ended", "eos", (EOS,)), response("cut off", "length")], reached]
    behind = [[ONE, ZERO], [ONE, 7], [FOUR, 9], [8, ONE], [ONE, EOS], [ONE, ZERO]]
    used = [2, 2, 1, 1, 2, 2]

    class Engine(ScriptedEngine):
        def generate(self, prompts, params, seeds=None):
            found = super().generate(prompts, params, seeds)
            own = [[Response(ids, [-7.0 - i, -8.0 - i], "length", 2)] for i, ids in enumerate(behind)]
            return found if len(self.asked) == 1 else own

    engine = Engine(first)
    params = SamplingParams(n=2, temperature=0.7, max_new_tokens=24)
    sampled = sample_trajectories(engine, TOKENIZER, scale, PROMPTS, params, "force", (40, 50, 60), score=True)
    (_, critiques, _), (sequences, asked, seeds) = engine.asked
    assert (critiques.stop, critiques.max_new_tokens, critiques.n) == (("[RESULT]",), 22, 2)
    assert (asked.stop, asked.max_new_tokens, asked.n, asked.temperature) == ((), 2, 1, 0.7)
    assert seeds == [42, 43, 52, 53, 62, 63]
    trajectories = [t for group in sampled.trajectories for t in group]
    for i, t in enumerate(trajectories):
        answer = t.answer_index + 1
        assert t.response_ids[answer:] == behind[i][: used[i]]
        assert TOKENIZER.decode(t.response_ids[:answer]).endswith("[RESULT]")
        assert t.old_logprobs[answer:] == [-7.0 - i, -8.0 - i][: used[i]]
        assert len(t.old_logprobs) == len(t.loss_mask) == len(t.response_ids)
        assert t.loss_mask[answer:] == [True] * used[i] and t.forced_anchor == (i in (2, 3))
        assert sequences[i] == PROMPTS[i // 2] + t.response_ids[:answer]
        assert scale.tree.read(t.response_ids[answer:]) == (scores[i], used[i])
    assert sampled.metrics["off_scale"] == scores.count(None) / 6 and sampled.metrics["forced"] == 2 / 6


@pytest.mark.parametrize("scale", [SCALE, TREE_SCALE, ENDED_SCALE], ids=["one token", "any end", "end of sequence"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_embedded_engine_samples_scores_from_the_distribution_that_it_reports(temperature, scale):
    """Every token's log-prob, the score's behind own and forced anchors included, against the whole vocabulary's at
    that position. fp32 with another batch shape and a cache."""
    engine = anchoring_engine(TOKENIZER, scale)
    prompts = [TOKENIZER.encode(text) for text in ("The answer", "poor")]
    params = SamplingParams(n=16, temperature=temperature, max_new_tokens=24)
    sampled = sample_trajectories(engine, TOKENIZER, scale, prompts, params, "force", [1, 2], score=True)
    kinds, off_scale, lengths = set(), 0, set()
    everything = [Branch((), tuple(range(len(TOKENIZER))))]
    for prompt, group in zip(prompts, sampled.trajectories, strict=True):
        for t in group:
            behind = t.response_ids[t.answer_index + 1 :]
            places = range(len(t.response_ids) - len(behind), len(t.response_ids))
            logits = engine.branch_logprobs([prompt + t.response_ids[:place] for place in places], everything)
            expected = torch.log_softmax(logits / temperature, -1)[range(len(behind)), behind]
            torch.testing.assert_close(torch.tensor(t.old_logprobs)[places], expected, rtol=0, atol=2e-5)
            score, used = scale.tree.read(behind)
            assert used == len(behind) and all(t.loss_mask[place] for place in places) and len(t.response_ids) <= 24
            off_scale += score is None
            lengths.add(used)
            kinds.add((t.forced_anchor, score is not None))
    # (forced anchor, on the scale)
    assert (
        {(False, True), (True, True)} <= kinds if scale is SCALE else {forced for forced, _ in kinds} == {False, True}
    )
    assert max(lengths) == scale.tree.most_tokens
    assert sampled.metrics["off_scale"] == off_scale / 32
