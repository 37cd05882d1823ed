"""Bytes of what a run writes and sends: training checkpoints, and the weights alone."""

from dataclasses import dataclass
from math import prod

from real_megatron.bridge import padded_vocab, parameter_count, parameters
from real_megatron.planning.workload import Layout


@dataclass(frozen=True)
class Storage:
    """Bytes of one set of each, as the functions below say. A mixture has thousands of parameters to add up: once."""

    weights: int
    checkpoint: int

    @classmethod
    def of(cls, layout: Layout) -> "Storage":
        return cls(weight_bytes(layout), checkpoint_bytes(layout))


def weight_bytes(layout: Layout) -> int:
    """The weights in `model.dtype`, as servers get them and the Hugging Face checkpoint has them."""
    return parameter_count(layout.description) * layout.itemsize


def checkpoint_bytes(layout: Layout) -> int:
    """A training checkpoint, but for some kilobytes a tensor and rank: weights with the vocabulary's padding, Adam's
    two moments, and float32 copies of the weights, which the distributed optimizer saves of float32 weights, too."""
    rows = padded_vocab(layout.description, layout.parallel.tensor, layout.model.vocab_multiple)
    elements = sum(prod(parameter.transform.shape) for parameter in parameters(layout.description, rows))
    copies = layout.parallel.distributed_optimizer or layout.model.dtype != "float32"
    return elements * (layout.itemsize + 8 + 4 * copies)
