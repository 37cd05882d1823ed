"""Replies of SGLang's native POST /generate, checked before anything of them is used."""

import math
from collections.abc import Sequence
from typing import Any

from real_megatron.errors import EngineError
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.remote.errors import Retryable, StaleReply
from real_megatron.scores import Branch

RESERVED_TOKENS = 2
"""SGLang 0.5.21 ends a response this many tokens before its context length, whatever was asked for."""


def generation_body(prompt: list[int], params: SamplingParams, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """A request for `params.n` samples: the server prefills the prompt once. Every sampling parameter is named, since
    a server may have defaults of its own. stop_ids: end-of-sequence tokens."""
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "max_new_tokens": params.max_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": list(stop_ids),
        },
        "return_logprob": True,
    }
    if params.watch_ids:
        body["token_ids_logprob"] = list(params.watch_ids)
    return body


def scoring_body(sequence: list[int], branches: Sequence[Branch]) -> dict[str, Any]:
    """A request for the log-probabilities behind the branches of a sequence, a batch of as many inputs; nothing is
    generated."""
    return {
        "input_ids": [[*sequence, *branch.path] for branch in branches],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [list(branch.ids) for branch in branches],
    }


def parse_generation(reply: Any, params: SamplingParams, labels: set[str], version: int) -> list[Response]:
    """The responses of one request, as weight version `version`.

    labels: those that the servers may give the current weights

    Raises Retryable when the reply is not exactly `n` whole responses, StaleReply when other weights were used, and
    EngineError when the server's context is too small for what was asked.
    """
    samples = reply if isinstance(reply, list) else [reply]
    if len(samples) != params.n:
        raise Retryable(f"{len(samples)} responses, asked for {params.n}")
    try:
        return [_response(sample, params, labels, version) for sample in samples]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Retryable(f"the reply has not the expected form: {error!r}") from error


def parse_scoring(reply: Any, branches: Sequence[Branch], labels: set[str]) -> list[float]:
    """Log-probabilities in the order of the branches and their ids. Raises Retryable or StaleReply."""
    if not isinstance(reply, list) or len(reply) != len(branches):
        raise Retryable(f"the reply is not one of {len(branches)} inputs")
    try:
        for one in reply:
            check_labels(one["meta_info"], labels)
        return [
            value
            for one, branch in zip(reply, branches, strict=True)
            for value in _values(one["meta_info"]["output_token_ids_logprobs"][0], branch.ids)
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Retryable(f"the reply has not the expected form: {error!r}") from error


def _response(sample: dict[str, Any], params: SamplingParams, labels: set[str], version: int) -> Response:
    meta = sample["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] not in ("stop", "length"):
        raise Retryable(f"the server gave the request up: {finish}")
    check_labels(meta, labels)
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    ids = [entry[1] for entry in meta["output_token_logprobs"]]
    if not ids or ids != sample["output_ids"] or len(ids) != meta["completion_tokens"]:
        raise Retryable(
            f"{len(ids)} log-probabilities for {len(sample['output_ids'])} tokens ({meta['completion_tokens']} counted)"
        )
    # JSON has neither NaN nor infinity: SGLang writes them as null.
    if None in logprobs or not all(map(math.isfinite, logprobs)):
        raise Retryable("a log-probability is not finite")
    watched = None
    if params.watch_ids:
        watched = [_values(position, params.watch_ids) for position in meta["output_token_ids_logprobs"]]
        if len(watched) != len(ids):
            raise Retryable(f"{len(watched)} positions with watched tokens for {len(ids)} tokens")
    if finish["type"] == "length":
        reason = "length"
        if len(ids) < params.max_new_tokens:
            raise EngineError(
                f"the server ended a response after {len(ids)} of {params.max_new_tokens} tokens: its --context-length "
                f"must be {RESERVED_TOKENS} above the longest prompt and response together"
            )
    else:
        # `matched` is the token's id for an end of sequence, the text for a stop text.
        reason = "stop" if isinstance(finish["matched"], str) else "eos"
    return Response(ids, logprobs, reason, version, watched)


def _values(entries: list[list[Any]], ids: Sequence[int]) -> list[float]:
    by_id = {entry[1]: entry[0] for entry in entries}
    return [float(by_id[i]) for i in ids]


def check_labels(meta: dict[str, Any], labels: set[str]) -> None:
    """Raise StaleReply unless every token is from `labels`; a response that spans a sync lists several."""
    used = {span["version"] for span in meta.get("weight_versions") or []} | {meta["weight_version"]}
    if not used <= labels:
        raise StaleReply(f"sampled from weights {sorted(used)}, current are {sorted(labels)}")
