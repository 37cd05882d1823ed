"""Where a rank's columns lie in the vocabulary, and the one collective of the forward pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from real_megatron.head.rows import GatherRows

# PyTorch 2.13 renamed both collectives and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class VocabularyShard(NamedTuple):
    """This rank holds the vocabulary ids `first_id … first_id + columns - 1` in its first `columns` columns.

    Further columns are Megatron's padding: real weights that stand for no token.
    """

    first_id: int
    columns: int


def vocabulary_shard(
    local_columns: int, rows: GatherRows, vocab_size: int, padded_vocab_size: int | None, group: ProcessGroup | None
) -> VocabularyShard:
    """The shard of this rank of `group`. ValueError if the columns cannot be a vocabulary-parallel shard."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be positive, got {vocab_size}")
    if rows.id_range is not None and (rows.id_range[0] < 0 or rows.id_range[1] >= vocab_size):
        raise ValueError(
            f"ids reach from {rows.id_range[0]} to {rows.id_range[1]}, outside [0, vocab_size={vocab_size})"
        )
    if padded_vocab_size is not None and local_columns * size != padded_vocab_size:
        raise ValueError(
            f"{local_columns} local columns on {size} ranks are not the padded vocabulary of {padded_vocab_size}: pass "
            "this rank's own shard (parallel_output=True), not gathered logits"
        )
    if local_columns * size < vocab_size:
        raise ValueError(f"{local_columns} local columns on {size} ranks cannot hold a vocabulary of {vocab_size}")
    if size > 1 and local_columns >= vocab_size and padded_vocab_size is None:
        raise ValueError(
            f"each of {size} ranks has {local_columns} columns, as many as the whole vocabulary of {vocab_size}: these "
            "look like gathered logits, whose gradient would be wrong; pass this rank's own shard (parallel_output="
            "True), or name padded_vocab_size if the vocabulary really is padded this far"
        )
    first_id = rank * local_columns
    return VocabularyShard(first_id, min(max(vocab_size - first_id, 0), local_columns))


def all_gather_packed(packed: Tensor, group: ProcessGroup | None) -> Tensor:
    """[n] on each rank of `group` → [size, n], in rank order; no communication for one rank or nothing to send."""
    if group is None or group.size() == 1:
        return packed.unsqueeze(0)
    gathered = packed.new_empty(group.size(), packed.numel())
    if packed.numel():
        _all_gather(gathered.view(-1), packed, group=group)
    return gathered


class RowStats(NamedTuple):
    """Merged over ranks: `max` [R], `sum` = Σ exp(z - max) [R], `logits` [nnz] and, where values were given,
    `expectation` = Σ_j value_j · p_j [R]."""

    max: Tensor
    sum: Tensor
    logits: Tensor
    expectation: Tensor | None

    def log_probs(self, row_index: Tensor) -> Tensor:
        """[nnz]. Subtracts the maximum first, so that the error does not grow with the size of the logits."""
        return (self.logits - self.max[row_index]) - self.sum.log()[row_index]


def merge_packed(gathered: Tensor, num_rows: int, nnz: int, has_values: bool) -> RowStats:
    """Merge packed statistics `[shards, k·R + nnz]`: max, sum, (value-weighted sum,) gathered logits.

    The shards are those of all ranks, or what was seen so far and one more chunk. Sums run in the order of the shards
    on every rank, so all ranks hold the same bits.
    """
    lengths = [num_rows] * (3 if has_values else 2) + [nnz]
    maxima, sums, *weighted, logits = gathered.split(lengths, dim=1)
    maximum = maxima.amax(0)
    # A shard of nothing but -inf (or nothing but padding) has sum 0. If all shards of a row are like that, its maximum
    # is -inf: the finite base keeps the sum 0 instead of NaN, and `log_probs` then gives NaN, as log_softmax does.
    scale = torch.exp(maxima - maximum.masked_fill(maximum == -torch.inf, 0))
    total = _sum_in_order(sums * scale)
    expectation = _sum_in_order(weighted[0] * scale) / total if has_values else None
    return RowStats(maximum, total, logits.amax(0), expectation)


def _sum_in_order(per_shard: Tensor) -> Tensor:
    total = per_shard[0]
    for term in per_shard[1:]:
        total = total + term
    return total


def reduce_scatter_rows(full: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Start to sum `full` [R, H] over `group`. Returns this rank's shard of R/size rows, which is complete once the
    returned work has been waited for. ValueError if the rows cannot be divided over the ranks."""
    if full.shape[0] % group.size():
        raise ValueError(f"{full.shape[0]} rows cannot be divided over {group.size()} ranks")
    own = full.new_empty(full.shape[0] // group.size(), *full.shape[1:])
    return own, _reduce_scatter(own, full, group=group, async_op=True)
