"""The definition of gathered log-softmax, which all kernels are tested against."""

import torch
from torch import Tensor

from real_megatron.head.rows import GatherRows


def reference_gathered_log_softmax(logits: Tensor, rows: GatherRows) -> Tensor:
    """`out[j] = logits[row(j), ids[j]] - logsumexp(logits[row(j), :])` for each j of the CSR list.

    logits: float64 [R, V], the whole true vocabulary on one rank. Returns float64 [nnz], differentiable.
    """
    assert logits.dtype == torch.float64, (
        "the reference is float64: upcast first, so that the comparison means something"
    )
    return torch.log_softmax(logits, dim=-1)[rows.row_index, rows.ids]
