"""Gathered log-softmax: the one operation that the objective needs from the model. Knows PyTorch only."""

from real_megatron.head.held import HeldTensorError
from real_megatron.head.linear import linear_gathered_log_softmax
from real_megatron.head.logits import gathered_log_softmax
from real_megatron.head.reference import reference_gathered_log_softmax
from real_megatron.head.rows import GatherRows

__all__ = [
    "GatherRows",
    "HeldTensorError",
    "gathered_log_softmax",
    "linear_gathered_log_softmax",
    "reference_gathered_log_softmax",
]
