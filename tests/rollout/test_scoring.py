"""Critiques with score distributions: the engine's own log-probs in one pass against a second pass."""

import pytest
import torch

from real_megatron.errors import ConfigError, EngineError, PromptRefused
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.sampling import critique_tokens
from real_megatron.rollout.scoring import sample_scored
from real_megatron.scores import Branch, ScoreScale, ScoreTree
from tests.support.rollout_fakes import ScriptedEngine, anchoring_engine
from tests.support.rollout_models import byte_level

TOKENIZER = byte_level()
SCALE = ScoreScale.resolve(TOKENIZER, ["1", "4", "5"], None, "[RESULT] ")
PROMPTS = [TOKENIZER.encode(text) for text in ("The answer", "poor", "It ignores the question")]
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def engine():
    return anchoring_engine(TOKENIZER, SCALE)


def second_pass(engine, prompt, scored):
    return engine.branch_logprobs([prompt + scored.response_ids], [Branch((), tuple(SCALE.score_ids))])[0]


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
@pytest.mark.parametrize("rule", ["drop", "force"])
def test_one_pass_equals_a_second_pass(engine, temperature, rule):
    params = SamplingParams(n=16, temperature=temperature, max_new_tokens=24)
    groups = sample_scored(engine, TOKENIZER, SCALE, PROMPTS, params, rule, SEEDS)
    read = forced = 0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 16
        for scored in group:
            anchored = TOKENIZER.decode(scored.response_ids).endswith(SCALE.anchor_text)
            assert anchored == (scored.score_logprobs is not None) or rule == "force"
            if scored.score_logprobs is None:
                assert rule == "drop" and scored.finish_reason != "stop"
                continue
            read += not scored.forced_anchor
            forced += scored.forced_anchor
            assert (scored.finish_reason == "stop") == (not scored.forced_anchor)
            # fp32 with another batch shape and a cache.
            torch.testing.assert_close(
                torch.tensor(scored.score_logprobs), second_pass(engine, prompt, scored), atol=2e-5, rtol=0
            )
    assert read > 0
    # Greedy critiques of this model all reach the anchor.
    assert (forced > 0) == (rule == "force" and temperature > 0)


@pytest.mark.parametrize("ends", [[], ["eos"]], ids=["any end", "end of sequence"])
def test_scores_of_several_tokens_are_read_token_by_token(ends):
    """log π of each score, its tokens and its end asked for one at a time behind whole texts."""
    scale = ScoreScale.resolve(TOKENIZER, ["1", "4", "5", "10", "14"], None, "[RESULT] ", ends=ends)
    engine = anchoring_engine(TOKENIZER, scale)
    everything = [Branch((), tuple(range(len(TOKENIZER))))]
    params = SamplingParams(n=4, max_new_tokens=24)
    groups = sample_scored(engine, TOKENIZER, scale, PROMPTS, params, "force", SEEDS)
    assert {scored.forced_anchor for group in groups for scored in group} == {True, False}
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for scored in group:
            assert len(scored.response_ids) <= 24 - scale.tree.most_tokens
            whole = prompt + scored.response_ids
            first, second = engine.branch_logprobs([whole, [*whole, scale.tree.paths[0][0]]], everything).double()
            one, four, five, (_, zero), (_, more) = scale.tree.paths
            end = second[TOKENIZER.eos_token_id] if ends else (1 - second[[zero, more]].exp().sum()).log()
            exact = [first[one] + end, first[four], first[five], first[one] + second[zero], first[one] + second[more]]
            # fp32 with another batch shape and a cache.
            found = torch.tensor(scored.score_logprobs, dtype=torch.float64)
            torch.testing.assert_close(found, torch.stack([value.reshape(()) for value in exact]), atol=2e-5, rtol=0)


def test_generation_stops_behind_the_score(engine):
    asked = []

    class Spy:
        def generate(self, prompts, params, seeds):
            asked.append(params)
            groups = engine.generate(prompts, params, seeds)
            asked.append(groups)
            return groups

        branch_logprobs = engine.branch_logprobs

    params = SamplingParams(n=16, max_new_tokens=24)
    groups = sample_scored(Spy(), TOKENIZER, SCALE, PROMPTS, params, "drop", SEEDS)
    assert asked[0].stop == tuple(SCALE.anchor_text + text for text in (" 1", " 4", " 5"))
    sampled = 0
    for row, responses in zip(groups, asked[1], strict=True):
        for scored, response in zip(row, responses, strict=True):
            cut = len(scored.response_ids)
            if cut < len(response.token_ids) and response.token_ids[cut] in SCALE.score_ids:
                sampled += 1
                if response.finish_reason == "stop":
                    assert len(response.token_ids) == cut + 1
    assert sampled > 0


def test_a_prompt_that_is_refused_with_its_critique_is_named_by_its_own_index(engine):
    """The second pass asks for other sequences than the first: some prompts have none, some have several."""
    limit = engine.model.config.max_position_embeddings
    answered, open_end = TOKENIZER.encode("good [RESULT] 4"), TOKENIZER.encode("no")
    scripted = [
        [Response(answered, [-1.0] * len(answered), "stop", 0, [[-1.0] * 3] * len(answered))] * 2,
        [Response(answered, [-1.0] * len(answered), "stop", 0, [[-1.0] * 3] * len(answered))] * 2,
        [Response(open_end, [-1.0] * len(open_end), "length", 0, [[-1.0] * 3] * len(open_end))] * 2,
        [Response(open_end, [-1.0] * len(open_end), "length", 0, [[-1.0] * 3] * len(open_end))] * 2,
    ]

    class Generated(ScriptedEngine):
        branch_logprobs = staticmethod(engine.branch_logprobs)

    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1], [5] * (limit - len(open_end))]
    with pytest.raises(PromptRefused, match=f"exceeds the model's {limit} positions") as refused:
        sample_scored(Generated(scripted), TOKENIZER, SCALE, prompts, SamplingParams(n=2), "force")
    assert refused.value.index == 3  # of the second pass it is the sequence number 2


@pytest.mark.parametrize("spare", [0, 1])
def test_a_prompt_of_full_length_can_be_judged_whatever_the_critique_is(engine, spare):
    """Prompt and response together fill the model's positions; an appended anchor must not go beyond them."""
    params = SamplingParams(n=8, max_new_tokens=12)
    prompt = (PROMPTS[0] * 200)[: engine.model.config.max_position_embeddings - 12 - spare]
    (group,) = sample_scored(engine, TOKENIZER, SCALE, [prompt], params, "force", [1])
    forced = [scored for scored in group if scored.forced_anchor]
    assert forced and all(len(scored.response_ids) <= 12 for scored in group)
    torch.testing.assert_close(
        torch.tensor(forced[0].score_logprobs), second_pass(engine, prompt, forced[0]), atol=2e-5, rtol=0
    )


def test_an_engine_that_leaves_out_the_scores_is_an_error():
    ids = TOKENIZER.encode("good [RESULT] 4")
    silent = ScriptedEngine([[Response(ids, [-1.0] * len(ids), "stop", 0)]])
    with pytest.raises(EngineError, match="no score log-probabilities for prompt 0"):
        sample_scored(silent, TOKENIZER, SCALE, PROMPTS[:1], SamplingParams())


def test_a_limit_that_leaves_no_room_for_a_critique_is_refused() -> None:
    scale = ScoreScale(["1", "12"], [1.0, 12.0], ScoreTree([[[1]], [[1, 2]]]), [3], "[RESULT]")
    assert critique_tokens(scale, 3) == 1 and critique_tokens(SCALE, 1) == 1
    with pytest.raises(ConfigError, match="data.max_response_tokens is 2, and a score alone takes 2 tokens"):
        critique_tokens(scale, 2)
