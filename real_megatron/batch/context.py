"""What one context-parallel rank runs of a micro-batch: its tokens, and the head rows that go with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from real_megatron.batch.packing import PackedMicrobatch
from real_megatron.batch.shares import Share


@dataclass(frozen=True)
class LocalBatch:
    """What one context-parallel rank runs of a micro-batch; all of it when the micro-batch is not shared out."""

    tokens: Tensor
    """Token ids, int64 `[T / cp]`."""
    positions: Tensor
    """Position of each token in its sequence, int64 `[T / cp]`."""
    row_positions: Tensor
    """Index into `tokens` of each of this rank's head rows, int64 `[R of this rank]`, in the micro-batch's order."""
    ids: Tensor
    offsets: Tensor
    """Vocabulary ids that those rows ask for, as in `PackedMicrobatch`."""
    share: Share | None = None
    token_slots: Tensor | None = None
    """Where each token of the micro-batch is when the ranks' shares are concatenated, int64 `[T]`."""
    logprob_slots: Tensor | None = None
    """The same for the log-probs, the ranks' padded to equal lengths of `logprob_width`, int64 `[nnz]`."""
    logprob_width: int = 0


def localize(microbatch: PackedMicrobatch, rank: int) -> LocalBatch:
    """The part of a micro-batch that context-parallel rank `rank` runs."""
    positions = microbatch.layout.positions()
    if microbatch.shares is None:
        return LocalBatch(microbatch.tokens, positions, microbatch.row_positions, microbatch.ids, microbatch.offsets)
    indices = [share.index() for share in microbatch.shares]
    each = indices[0].numel()
    owner = torch.empty_like(microbatch.tokens)
    slots = torch.empty_like(microbatch.tokens)
    for r, index in enumerate(indices):
        owner[index] = r
        slots[index] = r * each + torch.arange(each)
    row_owner = owner[microbatch.row_positions]
    lengths = microbatch.offsets.diff()
    entry_owner = row_owner.repeat_interleave(lengths)
    counts = torch.bincount(entry_owner, minlength=len(indices))
    width = max(1, int(counts.max()))
    logprob_slots = torch.empty_like(microbatch.ids)
    for r, entries in enumerate(counts.tolist()):
        logprob_slots[entry_owner == r] = r * width + torch.arange(entries)
    mine = row_owner == rank
    return LocalBatch(
        tokens=microbatch.tokens[indices[rank]],
        positions=positions[indices[rank]],
        row_positions=slots[microbatch.row_positions[mine]] - rank * each,
        ids=microbatch.ids[entry_owner == rank],
        offsets=torch.cat((lengths.new_zeros(1), lengths[mine].cumsum(0))),
        share=microbatch.shares[rank],
        token_slots=slots,
        logprob_slots=logprob_slots,
        logprob_width=width,
    )
