"""What one context-parallel rank runs of a micro-batch: its tokens, and the head rows that belong to them.

Context-parallel ranks run one micro-batch together, each its shard of the tokens. Twice they need each other's results:
keys and values in every attention layer, and log-probs before the objective (policy/context.py). Both exchanges are
all-gathers, which return the ranks' results one after the other in rank order, and which need results of equal length.
The indices of this module ("slots") say where each token and each log-prob then is in the concatenation.

All ranks compute all slots, from the same micro-batch: nothing about the distribution is communicated.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from real_megatron.batch.packing import PackedMicrobatch
from real_megatron.batch.shards import TokenShard


@dataclass(frozen=True)
class LocalBatch:
    """What one context-parallel rank runs of a micro-batch; all of it when the micro-batch is not distributed."""

    tokens: Tensor
    """Token ids, int64 `[T / context]`."""
    positions: Tensor
    """Position of each token in its sequence, int64 `[T / context]`."""
    row_positions: Tensor
    """Index into `tokens` of each of this rank's head rows, int64 `[R of this rank]`, in the micro-batch's order."""
    ids: Tensor
    offsets: Tensor
    """Vocabulary ids that those rows ask for, as in `PackedMicrobatch`."""
    token_rows: int
    """How many of those rows, the first ones, are token rows."""
    exchange: "Exchange | None" = None
    """How this rank's results are combined with the other ranks'; None when one rank runs everything."""


@dataclass(frozen=True)
class Exchange:
    """Where the results of context-parallel ranks belong in the micro-batch, once they are concatenated."""

    shard: TokenShard
    """The tokens that this rank runs."""
    token_slots: Tensor
    """Where each token of the micro-batch is in the concatenation of the ranks' tokens, int64 `[T]`."""
    logprob_slots: Tensor
    """The same for the log-probs, int64 `[nnz]`, each rank's padded to `logprob_width`."""
    logprob_width: int
    """The most log-probs that one rank has, at least 1."""

    def to(self, device: torch.device) -> "Exchange":
        """The same with its tensors on `device`."""
        return replace(self, token_slots=self.token_slots.to(device), logprob_slots=self.logprob_slots.to(device))


def localize(microbatch: PackedMicrobatch, rank: int) -> LocalBatch:
    """The tokens and head rows of a micro-batch that context-parallel rank `rank` runs."""
    positions = microbatch.tree.positions()
    token_rows = microbatch.token_trajectory.numel()
    if microbatch.shards is None:
        return LocalBatch(
            microbatch.tokens, positions, microbatch.row_positions, microbatch.ids, microbatch.offsets, token_rows
        )
    indices = [shard.index() for shard in microbatch.shards]
    each = indices[0].numel()
    owner = torch.empty_like(microbatch.tokens)
    slots = torch.empty_like(microbatch.tokens)
    for r, index in enumerate(indices):
        owner[index] = r
        # Every shard has `each` tokens, so rank r's begin at r · each of the concatenation.
        slots[index] = r * each + torch.arange(each)
    # A head row is computed by the rank that runs its token. Unlike tokens, rows are not spread evenly (most tokens of
    # a prompt have none): for the all-gather each rank pads its log-probs to the largest count, which is at least 1, so
    # that ranks do not gather empty tensors for a micro-batch of padding alone.
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
        token_rows=int(mine[:token_rows].sum()),
        exchange=Exchange(microbatch.shards[rank], slots, logprob_slots, width),
    )
