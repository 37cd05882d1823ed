"""The order in which examples are visited: a fresh seeded shuffle each epoch, addressed by step."""

import hashlib
import math
from functools import lru_cache

import numpy as np


class BatchOrder:
    """Batches of example indices. Batch `step` is a function of (seed, step) alone, so the position needs no state.

    Epochs follow one another without a gap: a batch may end one epoch and begin the next, no example is skipped, and
    none comes twice within an epoch.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if num_examples < 1:
            raise ValueError("no training examples")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of step `step` (counted from 0), in order."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._permutation(p // self.num_examples)[p % self.num_examples]) for p in positions]

    def steps_of(self, epochs: float) -> int:
        """Steps that visit every example `epochs` times (rounded up to whole batches)."""
        return math.ceil(epochs * self.num_examples / self.batch_size)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)


def rollout_seed(seed: int, step: int, index: int) -> int:
    """The sampling seed of the prompt at position `index` of a step's batch: 63 bits that depend on nothing else."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
