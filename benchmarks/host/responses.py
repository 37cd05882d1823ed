"""What travels of responses: those of servers to all ranks, and the readings of an evaluation.

    python -m benchmarks.host.responses --ranks 2 8 32

Gloo ranks on this machine; engines return prepared responses. Finding the anchor and decoding cost nothing here, so
that the seconds are those of what travels and of what is made of it; ranks share the processors, which a node's do not.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch.distributed as dist

from benchmarks.host.ranks import run
from benchmarks.host.row import Row
from benchmarks.measure import peak_bytes, reset_peak, return_freed_memory
from real_megatron.batch.types import Trajectory
from real_megatron.config import RunConfig
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.judging.judge import Judge
from real_megatron.judging.reading import read_response
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.rollout.scoring import ScoredResponse
from real_megatron.scores import ScoreScale

SERVERS, READINGS = "responses of servers to all ranks", "readings of an evaluation"
PROMPTS, SAMPLES, TOKENS = 256, 8, 600
"""Of a step: 2,048 responses."""
EXAMPLES, BATCH = 2048, 256
"""Of an evaluation, with one critique each; how many are asked for at a time."""
GATHERED = 18
"""Bytes of a token and its log-prob in a pickled message, at most: to know beforehand what memory it takes."""


class _Scale(ScoreScale):
    """The score is the last token."""

    def cut(self, tokenizer: Any, ids: Sequence[int]) -> int:
        return len(ids) - 1


class _Letters:
    """A tokenizer whose ids are bytes: decoding is no part of the comparison."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("latin-1")


class _Prepared:
    """An engine behind its work: what it has to return is there."""

    def __init__(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self._groups = {prompt[0]: [_response(prompt[0], params) for _ in range(params.n)] for prompt in prompts}

    def generate(self, prompts: Sequence[list[int]], *_: object) -> list[list[Response]]:
        return [self._groups[prompt[0]] for prompt in prompts]


def _response(seed: int, params: SamplingParams) -> Response:
    random = np.random.default_rng(seed)
    # Letters where the text is read; else any id of a large vocabulary.
    ids = random.integers(*(97, 123) if params.watch_ids else (0, 150_000), TOKENS).tolist()
    logprobs = random.uniform(-9, 0, (TOKENS, 1 + len(params.watch_ids))).astype(np.float32).tolist()
    watched = [row[1:] for row in logprobs] if params.watch_ids else None
    return Response(ids, [row[0] for row in logprobs], "stop", 0, watched)


# --- what a rank does -------------------------------------------------------------------------------------------------


def _gathered(own: list[tuple[int, list[Response]]]) -> list[list[Response]]:
    """The old way: every rank's responses to every rank, as pickled objects, padded to the largest message."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, own)
    groups = dict(pair for pairs in values for pair in pairs)
    return [groups[i] for i in range(len(groups))]


def _servers_before() -> Callable[[], object]:
    prompts = [[i] for i in range(PROMPTS)]
    first, scale = dist.get_rank() == 0, _scale()
    own = list(enumerate(_Prepared(prompts, _STEP).generate(prompts))) if first else []

    def trajectory(response: Response) -> Trajectory:
        cut = scale.cut(None, response.token_ids)
        return Trajectory(response.token_ids[:cut], cut - 1, [True] * cut, response.logprobs[:cut])

    return lambda: [[trajectory(response) for response in group] for group in _gathered(own)]


def _servers_after() -> Callable[[], object]:
    prompts: list[list[int]] = [[i] for i in range(PROMPTS)]
    own: Any = _Prepared(prompts, _STEP) if dist.get_rank() == 0 else FollowerEngine()
    engine, tokenizer, scale = DistributedRollout(own), byte_tokenizer(), _scale()
    return lambda: sample_trajectories(engine, tokenizer, scale, prompts, _STEP)


def _readings_before() -> Callable[[], object]:
    scale, letters, rank, size = _scale(), _Letters(), dist.get_rank(), dist.get_world_size()
    engine = _own_examples(scale)

    def read() -> object:
        rows = []
        for start in range(0, EXAMPLES, BATCH):
            indices = range(rank, BATCH, size)
            own = engine.generate([[start + i] for i in indices])
            for (response,) in _gathered(list(zip(indices, own, strict=True))):
                cut = scale.cut(None, response.token_ids)
                assert response.watched is not None
                scored = ScoredResponse(response.token_ids[:cut], response.watched[cut], None, False, "stop")
                rows.append([read_response(letters, scale, scored, 0.5, False)])  # type: ignore[arg-type]
        return rows

    return read


def _readings_after() -> Callable[[], object]:
    scale = _scale()
    config = RunConfig.from_tree({"data": {"max_response_tokens": TOKENS}})
    own: Any = _own_examples(scale)
    letters: Any = _Letters()
    judge = Judge(DistributedRollout(own), letters, scale, config)

    def read() -> object:
        rows = []
        for start in range(0, EXAMPLES, BATCH):
            examples = range(start, start + BATCH)
            rows += judge.read([[i] for i in examples], [str(i) for i in examples])
        return rows

    return read


_STEP = SamplingParams(n=SAMPLES, max_new_tokens=TOKENS)


def _scale() -> ScoreScale:
    return _Scale.resolve(byte_tokenizer(), list("12345"))


def _own_examples(scale: ScoreScale) -> _Prepared:
    """The engine of a rank, with the responses to its examples of each batch."""
    own = range(dist.get_rank(), BATCH, dist.get_world_size())
    prompts = [[start + i] for start in range(0, EXAMPLES, BATCH) for i in own]
    return _Prepared(prompts, SamplingParams(watch_ids=tuple(scale.score_ids)))


# --- measuring --------------------------------------------------------------------------------------------------------

_WAYS = {
    (SERVERS, "before"): _servers_before,
    (SERVERS, "after"): _servers_after,
    (READINGS, "before"): _readings_before,
    (READINGS, "after"): _readings_after,
}


@dataclass
class _Seen:
    """What a rank has measured: of bytes in use, the most beyond those at the start, and what is left of them."""

    seconds: float = 0.0
    received: float = 0.0
    peak: float = 0.0
    left: float = 0.0


@contextmanager
def _counting(seen: _Seen) -> Iterator[None]:
    """Add what collectives and messages give this rank."""
    gather, broadcast, receive = dist.distributed_c10d.all_gather, dist.broadcast, dist.recv

    def all_gather(tensors: list[Any], tensor: Any, **of: Any) -> Any:
        seen.received += tensor.nbytes * (len(tensors) - 1)
        return gather(tensors, tensor, **of)

    def counted_broadcast(tensor: Any, **of: Any) -> Any:
        seen.received += tensor.nbytes * (of["group_src"] != dist.get_rank())
        return broadcast(tensor, **of)

    def counted_receive(tensor: Any, **of: Any) -> Any:
        seen.received += tensor.nbytes
        return receive(tensor, **of)

    with (
        mock.patch.object(dist.distributed_c10d, "all_gather", all_gather),
        mock.patch.object(dist, "broadcast", counted_broadcast),
        mock.patch.object(dist, "recv", counted_receive),
    ):
        yield


def _measure(part: str, variant: str) -> _Seen:
    call, seen = _WAYS[part, variant](), _Seen()
    gc.collect()
    return_freed_memory()
    dist.barrier()
    before = reset_peak("cpu")
    start = time.perf_counter()
    with _counting(seen):
        result = call()
    seen.seconds = time.perf_counter() - start
    seen.peak = peak_bytes("cpu") - before
    gc.collect()
    return_freed_memory()
    seen.left = reset_peak("cpu") - before
    dist.barrier()
    del result
    return seen


def _fits(ranks: int) -> bool:
    """Whether this machine has memory for the old way: each rank's message from each rank, twice, since the collective
    has a copy of its own."""
    return 2 * ranks * ranks * PROMPTS * SAMPLES * TOKENS * GATHERED < 0.7 * psutil.virtual_memory().available


def rows(ranks: int) -> list[Row]:
    """Both parts, both ways, at so many ranks."""
    found = []
    for part in (SERVERS, READINGS):
        after = run(ranks, _measure, part, "after")
        if part == SERVERS and not _fits(ranks):
            # The message does not depend on the number of ranks, each of which gets it from each other one, padded.
            two = run(2, _measure, part, "before")
            message = max(seen.received for seen in two)
            before = Row(part, "before", ranks, None, message * (ranks - 1), 2 * message * ranks, "counted")
        else:
            before = _row(part, "before", ranks, run(ranks, _measure, part, "before"), after)
        found += [before, _row(part, "after", ranks, after, after)]
    return found


def _row(part: str, variant: Any, ranks: int, seen: list[_Seen], after: list[_Seen]) -> Row:
    """What is left at the end is that of the new way, where nothing else is kept from being freed."""
    seconds, received, peak = (max(getattr(one, name) for one in seen) for name in ("seconds", "received", "peak"))
    return Row(part, variant, ranks, seconds, received, max(0, peak - max(one.left for one in after)), "measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    for ranks in parser.parse_args().ranks:
        for row in rows(ranks):
            print(row, flush=True)


if __name__ == "__main__":
    main()
