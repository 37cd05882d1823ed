"""The kernels' arithmetic in plain PyTorch: any device, any float dtype (float64 too), no compiler.

Works on chunks of rows, so its temporary memory is a few MiB whatever the size of the logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from real_megatron.head.shard import VocabularyShard

CHUNK_BYTES = 8 << 20


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    height = max(1, CHUNK_BYTES // max(1, 4 * logits.shape[1]))
    for start in range(0, logits.shape[0], height):
        yield slice(start, min(start + height, logits.shape[0]))


def _local_columns(ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    local = ids - shard.first_id
    return local, (local >= 0) & (local < shard.columns)


def stats(
    logits: Tensor, ids: Tensor, offsets: Tensor, row_index: Tensor, values: Tensor | None, shard: VocabularyShard
) -> Tensor:
    """This shard's packed row statistics: max [R], Σ exp(z - max) [R], with `values` Σ_j value_j · exp(z_j - max)
    [R], then the logits of the ids asked for [nnz], -inf for ids of other shards. float32 (float64 for float64)."""
    dtype = accumulate_dtype(logits.dtype)
    maximum = logits.new_full((logits.shape[0],), -torch.inf, dtype=dtype)
    total = torch.zeros_like(maximum)
    if shard.columns:
        for chunk in _row_chunks(logits):
            x = logits[chunk, : shard.columns].to(dtype)
            maximum[chunk] = x.amax(1)
            base = _finite(maximum[chunk])
            total[chunk] = (x - base.unsqueeze(1)).exp_().sum(1)
    local, inside = _local_columns(ids, shard)
    z = logits[row_index, local.clamp(0, logits.shape[1] - 1)].to(dtype)
    z = z.masked_fill(~inside, -torch.inf)
    packed = [maximum, total]
    if values is not None:
        terms = values.to(dtype) * torch.exp(z - _finite(maximum)[row_index])
        packed.append(segment_sum(terms, offsets))
    return torch.cat([*packed, z])


def dlogits(
    logits: Tensor,
    out: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    shard: VocabularyShard,
) -> None:
    """Write d loss / d logits into `out` (which may be `logits`): -(Σ_j g_j)·p_v + Σ_j g_j·[v = id_j].

    Rows whose gradients sum to zero are not read: what they get is the sparse part alone. Padding gets exact zeros.
    """
    grad_sum = segment_sum(grad, offsets)
    coefficient = -grad_sum / total
    idle = (grad_sum == 0).unsqueeze(1)
    for chunk in _row_chunks(logits):
        x = logits[chunk, : shard.columns].to(maximum.dtype)
        d = (x - maximum[chunk].unsqueeze(1)).exp_().mul_(coefficient[chunk].unsqueeze(1)).masked_fill_(idle[chunk], 0)
        out[chunk, : shard.columns] = d.to(out.dtype)
        out[chunk, shard.columns :] = 0
    # Repeats of an id in a row all write the same, whole sum: bitwise repeatable without atomics.
    patch = _sum_repeats(grad, row_index, ids) - _sparse_probability(grad_sum, row_index, log_probs)
    local, inside = _local_columns(ids, shard)
    out[row_index[inside], local[inside]] = patch[inside].to(out.dtype)


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """Σ of x[offsets[r]:offsets[r + 1]] for each r, in order (no atomics); 0 for an empty segment."""
    if x.numel() == 0:
        return x.new_zeros(offsets.numel() - 1)
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0.0)


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _sparse_probability(grad_sum: Tensor, row_index: Tensor, log_probs: Tensor) -> Tensor:
    weight = grad_sum[row_index]
    return torch.where(weight == 0, 0, weight * log_probs.exp())


def _sum_repeats(grad: Tensor, row_index: Tensor, ids: Tensor) -> Tensor:
    """For each entry, the sum of `grad` over the entries of its row with the same id."""
    if grad.numel() == 0:
        return grad
    by_id = ids.argsort(stable=True)
    order = by_id[row_index[by_id].argsort(stable=True)]
    pairs = torch.stack([row_index[order], ids[order]])
    _, inverse, counts = pairs.unique_consecutive(dim=1, return_inverse=True, return_counts=True)
    sums = torch.segment_reduce(grad[order], "sum", lengths=counts, initial=0.0)
    return torch.empty_like(grad).index_copy_(0, order, sums[inverse])
