"""Reading and tokenising the training data: by each rank for itself, and once on each host for all its ranks.

    python -m benchmarks.host.data --ranks 2 8 32

The ranks are those of one host; `ROWS` rows of `WORDS` words, by a byte-level BPE tokenizer that was trained on them.
Bytes held are the peak of a rank's memory without the pages of files, above what it had before. They do not depend on
the number of ranks: of more than `MEASURED_RANKS` they are those of two. Bytes moved are read from the data set, or
sent by the first rank.
"""

import argparse
import json
import pickle
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.host.ranks import run
from benchmarks.host.row import Row
from real_megatron.batch.types import Group
from real_megatron.config import DataConfig, DataSource, RunConfig
from real_megatron.data import load_examples
from real_megatron.runtime import once_a_host
from real_megatron.scores import ScoreScale
from real_megatron.training.examples import prompt_groups

PART = "reading and tokenising data"
ROWS, WORDS = 4000, 1000
MEASURED_RANKS = 8
_DIFFERENT_WORDS = 20_000


def rows(ranks: int) -> list[Row]:
    """Both ways."""
    with tempfile.TemporaryDirectory() as scratch:
        write_task(Path(scratch))
        measured = ranks <= MEASURED_RANKS
        results = run(ranks if measured else 2, measure, Path(scratch))
    found = []
    for variant in ("before", "after"):
        seconds, moved, held = (max(one[variant][i] for one in results) for i in range(3))
        how = "measured" if measured else "counted"
        found.append(Row(PART, variant, ranks, seconds if measured else None, moved, held, how))
    return found


def write_task(directory: Path) -> None:
    """The data set, and a tokenizer that was trained on its words."""
    chosen = random.Random(0)
    words = [
        "".join(chosen.choices("abcdefghijklmnopqrstuvwxyz", k=chosen.randint(2, 9))) for _ in range(_DIFFERENT_WORDS)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=30_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" " + " ".join(words)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    with (directory / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(ROWS):
            file.write(json.dumps({"prompt": " ".join(chosen.choices(words, k=WORDS)), "label": i % 2}) + "\n")


def measure(directory: Path) -> dict[str, tuple[float, float, float]]:
    """One rank: of each way seconds, bytes moved and bytes held."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    file = directory / "train.jsonl"
    data = DataConfig(train=[DataSource(path=str(file))], max_prompt_tokens=8 * WORDS)
    config = RunConfig(data=data)
    scale = ScoreScale.resolve(tokenizer, ["0", "1"], None, "[RESULT] ")
    made: list[Any] = []

    def once() -> Any:
        made.append(prompt_groups(config, directory, tokenizer, scale).groups)
        return made[0]

    size = float(file.stat().st_size)
    # The new way first: the memory that the old one leaves to the allocator would be taken for nothing.
    after, stored = _cost(lambda: once_a_host(once))
    before, groups = _cost(lambda: every_rank(tokenizer, data))
    assert len(stored) == len(groups) and all(stored[i] == groups[i] for i in range(0, len(groups), 97))
    shared = float(len(pickle.dumps(stored)))
    return {"before": (before[0], size, before[1]), "after": (after[0], size if made else shared, after[1])}


def every_rank(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Group]:
    """The old way: each rank tokenises all texts in one call and keeps lists."""
    examples = load_examples(data.train[0])
    texts = [example.messages[0]["content"] for example in examples]
    ids = tokenizer(texts, add_special_tokens=True, return_attention_mask=False)["input_ids"]
    return [Group(row, [], e.label, e.id, e.meta) for e, row in zip(examples, ids, strict=True)]


def _cost(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds until the last rank is done, and the peak of this rank's own memory above what it had."""
    ended = threading.Event()
    seen = [own_memory()]

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    dist.barrier()
    start = time.perf_counter()
    watcher.start()
    result = work()
    ended.set()
    watcher.join()
    dist.barrier()
    return (time.perf_counter() - start, float(max(*seen, own_memory()) - seen[0])), result


def own_memory() -> int:
    """Resident bytes of this process that are no pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))


def main() -> None:
    """Print the rows of every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    for ranks in parser.parse_args().ranks:
        for row in rows(ranks):
            print(row, flush=True)


if __name__ == "__main__":
    main()
