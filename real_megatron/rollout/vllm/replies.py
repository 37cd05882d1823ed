"""vLLM's OpenAI-compatible POST /v1/completions, with its token-id extensions (vLLM 0.32)."""

import math
from collections.abc import Sequence
from typing import Any

from real_megatron.errors import EngineError
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.remote.errors import Retryable
from real_megatron.scores import Branch

_MOST_STOPS = 4
_MOST_WATCHED = 128
"""What the server takes in one request."""


def generation_body(
    model: str, prompt: list[int], params: SamplingParams, seed: int | None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """A request for the samples of a prompt. Every sampling parameter is named: the server takes those that are missing
    from the checkpoint's generation_config.json. stop_ids: end-of-sequence tokens.

    Raises EngineError for more stop texts or watched tokens than a server takes.
    """
    for what, count, most in (
        ("stop texts", len(params.stop), _MOST_STOPS),
        ("tokens whose log-probabilities are asked for", len(params.watch_ids), _MOST_WATCHED),
    ):
        if count > most:
            raise EngineError(
                f"{count} {what}: a vLLM server takes {most} in a request; set rollout.engine to transformers or sglang"
            )
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "n": _drawn(params),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "max_tokens": params.max_new_tokens,
        "stop": list(params.stop),
        "stop_token_ids": list(stop_ids),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # they are part of the text that stop texts are looked for in
        "logprobs": len(params.watch_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if params.watch_ids:
        body["logprob_token_ids"] = list(params.watch_ids)
    if seed is not None:
        # Sample k of a request draws from seed + k, which must be an int64 too.
        body["seed"] = seed % 2**62
    return body


def parse_generation(reply: Any, params: SamplingParams, version: int) -> list[Response]:
    """The `params.n` responses of one request. Raises Retryable when the reply is not exactly those asked for."""
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        drawn = _drawn(params)
        if [choice["index"] for choice in choices] != list(range(drawn)):
            raise Retryable(f"{len(choices)} responses, asked for {drawn}")
        return [_response(choices[k % drawn], params, version) for k in range(params.n)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Retryable(f"the reply has not the expected form: {error!r}") from error


def _drawn(params: SamplingParams) -> int:
    """How many responses differ: greedy ones are all the same, and a server refuses to draw more than one."""
    return params.n if params.temperature else 1


def scoring_body(model: str, sequence: list[int], branches: Sequence[Branch]) -> dict[str, Any]:
    """A request for the log-probabilities behind the branches of a sequence, with as many prompts; the one token that
    is drawn behind each is of no interest. All prompts watch the tokens of all branches."""
    params = SamplingParams(max_new_tokens=1, watch_ids=tuple(dict.fromkeys(i for b in branches for i in b.ids)))
    body = generation_body(model, sequence, params, None)
    return body | {"prompt": [[*sequence, *branch.path] for branch in branches]}


def scored_together(branches: Sequence[Branch]) -> list[list[Branch]]:
    """The branches, in order, as requests in which a server takes all their tokens."""
    requests: list[list[Branch]] = [[]]
    for branch in branches:
        watched = {i for other in (*requests[-1], branch) for i in other.ids}
        if requests[-1] and len(watched) > _MOST_WATCHED:
            requests.append([])
        requests[-1].append(branch)
    return requests


def parse_scoring(reply: Any, branches: Sequence[Branch]) -> list[float]:
    """Log-probabilities at the first generated position, in the order of the branches and their ids. Raises
    Retryable."""
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(len(branches))):
            raise Retryable(f"{len(choices)} choices for {len(branches)} prompts")
        return [
            value
            for choice, branch in zip(choices, branches, strict=True)
            for value in _values(choice["logprobs"]["top_logprobs"][0], _names(branch.ids))
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Retryable(f"the reply has not the expected form: {error!r}") from error


def _response(choice: dict, params: SamplingParams, version: int) -> Response:
    if choice["finish_reason"] not in ("stop", "length"):
        raise Retryable(f"the server gave the request up: {choice['finish_reason']}")
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if not ids or len(ids) != len(logprobs):
        raise Retryable(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
    if not all(map(math.isfinite, logprobs)):
        raise Retryable("a log-probability is not finite")
    watched = None
    if params.watch_ids:
        names = _names(params.watch_ids)
        watched = [_values(position, names) for position in choice["logprobs"]["top_logprobs"]]
        if len(watched) != len(ids):
            raise Retryable(f"{len(watched)} positions with watched tokens for {len(ids)} tokens")
    if choice["finish_reason"] == "length":
        reason = "length"
    else:
        # The stop text; for an end of sequence null, or the token's id.
        reason = "stop" if isinstance(choice.get("stop_reason"), str) else "eos"
    return Response(list(ids), list(logprobs), reason, version, watched)


def _names(ids: Sequence[int]) -> list[str]:
    """What a reply calls these tokens."""
    return [f"token_id:{i}" for i in ids]


def _values(position: dict[str, float], names: list[str]) -> list[float]:
    return [float(position[name]) for name in names]
