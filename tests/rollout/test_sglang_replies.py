"""Requests to, and replies of, SGLang 0.5.21, as recorded from the real server."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from real_megatron.errors import EngineError
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote.errors import Retryable, StaleReply
from real_megatron.rollout.sglang.replies import generation_body, parse_generation, parse_scoring
from real_megatron.scores import Branch

RECORDED = json.loads((Path(__file__).parent / "recorded_sglang.json").read_text(encoding="utf-8"))
LABEL = RECORDED["model_info"]["body"]["weight_version"]
PARAMS = SamplingParams(n=2, temperature=0.8, top_p=0.9, max_new_tokens=8, stop=("e", " t"), watch_ids=(6, 5))


def recorded(name: str):
    return copy.deepcopy(RECORDED[name]["body"])


def test_recorded_generation():
    responses = parse_generation(recorded("generate"), PARAMS, {LABEL}, 17)
    for response, sample in zip(responses, recorded("generate"), strict=True):
        meta = sample["meta_info"]
        assert response.token_ids == sample["output_ids"]
        assert response.logprobs == [entry[0] for entry in meta["output_token_logprobs"]]
        assert response.weight_version == 17
        # In the order asked for, which is not the server's.
        first = {entry[1]: entry[0] for entry in meta["output_token_ids_logprobs"][0]}
        assert response.watched[0] == [first[6], first[5]]
        assert len(response.watched) == len(response.token_ids)
    reasons = {
        (r.finish_reason, s["meta_info"]["finish_reason"]["type"])
        for r, s in zip(responses, recorded("generate"), strict=True)
    }
    assert reasons <= {("stop", "stop"), ("length", "length")}


def test_recorded_end_of_sequence():
    params = SamplingParams(n=1, max_new_tokens=100)
    (response,) = parse_generation(recorded("generate_eos"), params, {LABEL}, 0)
    assert (response.finish_reason, response.token_ids, response.watched) == ("eos", [1], None)


def test_a_response_that_the_server_cut_short_is_an_error():
    """Not a length that the request asked for: the server's context ended."""
    with pytest.raises(EngineError, match="after 8 of 9 tokens: its --context-length"):
        longer = replace(PARAMS, max_new_tokens=9)
        parse_generation([recorded("generate")[0]] * 2, longer, {LABEL}, 0)


def test_recorded_scoring():
    values = parse_scoring([recorded("score")], [Branch((), (300, 5))], {LABEL})
    by_id = {e[1]: e[0] for e in recorded("score")["meta_info"]["output_token_ids_logprobs"][0]}
    assert values == [by_id[300], by_id[5]]


def test_recorded_abort_is_tried_again():
    with pytest.raises(Retryable, match="gave the request up"):
        parse_generation(recorded("aborted"), SamplingParams(n=1), {LABEL, "x-1-incomplete"}, 0)


def damage(path: list, value):
    def apply(reply):
        target = reply[0]
        for key in path[:-1]:
            target = target[key]
        if value is None:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        return reply

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: reply[:1], "1 responses, asked for 2"),
        (lambda reply: reply + reply[:1], "3 responses, asked for 2"),
        (lambda reply: reply[0], "1 responses, asked for 2"),
        (lambda reply: {"error": {"message": "?"}}, "1 responses, asked for 2"),
        (damage(["meta_info", "output_token_logprobs"], None), "form: KeyError.'output_token_logprobs'"),
        (damage(["meta_info", "output_token_logprobs"], []), "0 log-probabilities for 8 tokens"),
        (damage(["output_ids"], [1, 2, 3]), "8 log-probabilities for 3 tokens"),
        (damage(["meta_info", "completion_tokens"], 3), r"8 log-probabilities for 8 tokens \(3 counted\)"),
        (damage(["meta_info", "output_token_ids_logprobs"], []), "0 positions with watched tokens for 8 tokens"),
        (damage(["meta_info", "output_token_ids_logprobs", 0], [[-1.0, 6, None]]), "form: KeyError.5"),
        (damage(["meta_info", "finish_reason"], None), "form: KeyError.'finish_reason'"),
        (damage(["meta_info", "output_token_logprobs", 0, 0], float("nan")), "a log-probability is not finite"),
        (damage(["meta_info", "output_token_logprobs", 0], [None, 56, None]), "a log-probability is not finite"),
    ],
)
def test_damaged_replies_are_tried_again(change, message):
    with pytest.raises(Retryable, match=message):
        parse_generation(change(recorded("generate")), PARAMS, {LABEL}, 0)


def test_a_response_that_spans_an_update_is_stale():
    reply = recorded("generate")
    reply[1]["meta_info"]["weight_versions"].insert(0, {"version": "before", "start": 0, "end": 1})
    with pytest.raises(StaleReply, match="before"):
        parse_generation(reply, PARAMS, {LABEL}, 0)
    with pytest.raises(StaleReply, match="current are .\"another run's label"):
        parse_scoring([recorded("score")], [Branch((), (5,))], {"another run's label"})


def test_every_sampling_parameter_is_named():
    """A server started with other preferences must not change what is sampled."""
    body = generation_body([1, 2], PARAMS, [7, 9])
    assert body["sampling_params"] == {
        "n": 2,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "max_new_tokens": 8,
        "stop": ["e", " t"],
        "stop_token_ids": [7, 9],
    }
    assert body["token_ids_logprob"] == [6, 5] and body["return_logprob"] is True
    assert "token_ids_logprob" not in generation_body([1], SamplingParams())
