"""A step's responses as texts: reading replies of servers, finding the score, counting n-grams.

    python -m benchmarks.host.texts --ranks 2 8 32

2,048 responses of 600 tokens of a byte-level BPE that is trained on this repository's documents; tokens are drawn as
often as they are there, so that n-grams are more varied than a judge's. Seconds are those of one core, garbage
collection included. None of this work depends on the number of ranks: replies are read on rank 0; until now every rank
did the rest, and with servers rank 0 now does it for all. So one process measures it, and rows of any number of ranks
have its numbers, as counted ones.
"""

import argparse
import bisect
import itertools
import json
import math
import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.host.row import Row
from real_megatron.batch.types import Group, Trajectory
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote.http import Reply
from real_megatron.rollout.sglang.replies import parse_generation
from real_megatron.scores import ScoreScale, decode
from real_megatron.training.rollouts import cot_metrics

RESPONSES, TOKENS, SAMPLES = 2048, 600, 8
VOCABULARY = 8192
LABEL = "run-1"
DOCUMENTS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


@dataclass(frozen=True)
class Measured:
    """One way to do a part."""

    seconds: float
    moved: float | None
    held: float
    """Most bytes of Python and numpy objects at a time, beside what goes in and what comes out."""


def rows(ranks: int, responses: int = RESPONSES, tokens: int = TOKENS) -> list[Row]:
    """All parts, both ways."""
    return [
        Row(part, variant, ranks, one.seconds, one.moved, one.held, "counted")
        for part, ways in parts(responses, tokens).items()
        for variant, one in ways.items()
    ]


@cache
def parts(responses: int, tokens: int) -> dict[str, dict[Literal["before", "after"], Measured]]:
    """What one process measures of each part. Raises AssertionError where both ways do not give the same."""
    tokenizer, scale, ids = _responses(responses, tokens)
    replies = [_reply(ids[i : i + SAMPLES]) for i in range(0, responses, SAMPLES)]
    cots = [ids[i : i + SAMPLES] for i in range(0, responses, SAMPLES)]
    groups = [Group([1], [Trajectory(one, len(one) - 1) for one in row], 1.0) for row in cots]
    params = SamplingParams(n=SAMPLES, max_new_tokens=tokens)

    def read(load: Callable[[bytes], Any]) -> Callable[[], list[Any]]:
        return lambda: [parse_generation(load(one), params, {LABEL}, 1) for one in replies]

    received = float(sum(map(len, replies)))
    return {
        "reading replies": _both(read(json.loads), read(lambda one: Reply(200, one).json()), received),
        "finding the score (cut)": _both(
            lambda: [_bisected_cut(scale, tokenizer, one) for one in ids],
            lambda: [scale.cut(tokenizer, one) for one in ids],
        ),
        "distinct n-grams": _both(
            lambda: [*(_distinct_of_tuples(ids, n) for n in (1, 2, 3)), _copies_of_tuples(cots)],
            lambda: list(cot_metrics(groups).values()),
        ),
    }


def _both(before: Callable[[], Any], after: Callable[[], Any], moved: float | None = None) -> dict[Any, Measured]:
    ways = {"before": _measured(before, moved), "after": _measured(after, moved)}
    assert ways["before"][0] == ways["after"][0]
    return {name: measured for name, (_, measured) in ways.items()}


def _measured(work: Callable[[], Any], moved: float | None) -> tuple[Any, Measured]:
    """The result, and what it took; memory in a second run, which is slower for being watched."""
    begin = time.process_time()
    result = work()
    seconds = time.process_time() - begin
    tracemalloc.start()
    again = work()
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert again == result
    return result, Measured(seconds, moved, float(most - left))


def _responses(count: int, tokens: int) -> tuple[PreTrainedTokenizerFast, ScoreScale, list[list[int]]]:
    """Texts of so many tokens, which the score's anchor ends, and their tokenizer."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    scale = ScoreScale.resolve(tokenizer, [str(k) for k in range(1, 6)])
    ids = tokenizer.encode("".join(texts).replace(scale.anchor_text, ""), add_special_tokens=False)
    length = tokens - len(scale.anchor_ids)
    rng = random.Random(0)
    return tokenizer, scale, [rng.choices(ids, k=length) + scale.anchor_ids for _ in range(count)]


def _reply(responses: Sequence[list[int]]) -> bytes:
    """What an SGLang server answers, with the fields that grow with the response."""
    rng = random.Random(0)

    def sample(ids: list[int]) -> dict[str, Any]:
        meta = {
            "finish_reason": {"type": "stop", "matched": "[RESULT] "},
            "weight_version": LABEL,
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-rng.expovariate(1.0), token, None] for token in ids],
        }
        return {"text": "word " * len(ids), "output_ids": ids, "meta_info": meta}

    return orjson.dumps([sample(ids) for ids in responses])


# --- before ---------------------------------------------------------------------------------------------------------


def _bisected_cut(scale: ScoreScale, tokenizer: Any, ids: list[int]) -> int | None:
    """`ScoreScale.cut`, by bisection over all of the response."""
    text = decode(tokenizer, ids)

    def prefix(t: int) -> tuple[int, int]:
        while not text.startswith(decoded := decode(tokenizer, ids[:t])):
            t += 1
        return len(decoded), t

    start = text.find(scale.anchor_text)
    while start >= 0:
        end = start + len(scale.anchor_text)
        lengths = range(1, len(ids) + 1)
        length, t = prefix(lengths[bisect.bisect_left(lengths, end, key=lambda t: prefix(t)[0])])
        if length == end:
            return t
        start = text.find(scale.anchor_text, start + 1)
    return None


def _distinct_of_tuples(texts: Sequence[list[int]], n: int) -> float:
    """`distinct_n`, with a set of tuples."""
    seen = set()
    total = 0
    for ids in texts:
        for start in range(len(ids) - n + 1):
            seen.add(tuple(ids[start : start + n]))
            total += 1
    return len(seen) / total if total else math.nan


def _copies_of_tuples(cots: Sequence[Sequence[list[int]]]) -> float:
    return sum(len(row) - len(set(map(tuple, row))) for row in cots) / sum(map(len, cots))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    for row in itertools.chain.from_iterable(map(rows, parser.parse_args().ranks)):
        print(row)


if __name__ == "__main__":
    main()
