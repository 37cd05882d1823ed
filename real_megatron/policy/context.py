"""The two exchanges of context-parallel ranks, which run one micro-batch together, each its shard of the tokens.

Everything else in the model works token by token. All-gathering keys and values (rather than passing them round a ring)
is how Llama 3 was trained (arXiv 2407.21783, section 3.3.2): with grouped queries they are small, and the mask may be
any. Both gathers are Megatron-Core's mappings over its context-parallel group.

Every context-parallel rank computes the whole objective of the micro-batch, from all log-probs. The objective needs
them together: a response's tokens lie on several ranks, but its score distribution, its importance weight and its
group's baseline are one. There is one number per token, so that gathering them costs little beside the model, and the
ranks need no further exchange to agree on loss and metrics.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def gather_keys_values(key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of this rank's tokens, `[T / context, …]` → of all tokens in packing order, `[T, …]`.

    slots: `Exchange.token_slots`. Each rank's queries give them a gradient: backward sums over the ranks (a
    reduce-scatter).
    """
    group = parallel_state.get_context_parallel_group()
    # Stacked, so that each layer has one exchange instead of two.
    own = torch.stack((key, value), dim=1)
    gathered = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)
    keys, values = gathered.index_select(0, slots).unbind(1)
    return keys, values


def gather_logprobs(logprobs: Tensor, slots: Tensor, width: int) -> Tensor:
    """Log-probs of this rank's rows → of all rows in the micro-batch's order, `[nnz]`, the same on every rank.

    slots, width: `logprob_slots` and `logprob_width` of `Exchange`. Every rank computes the whole objective from them,
    so that every rank's gradient is the whole one already: backward keeps that of this rank's rows and sums nothing
    (a sum would count it once per rank).
    """
    group = parallel_state.get_context_parallel_group()
    padded = F.pad(logprobs, (0, width - logprobs.numel()))
    gathered = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=False, group=group)
    return gathered.index_select(0, slots)
