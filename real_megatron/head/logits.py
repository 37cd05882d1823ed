"""Gathered log-softmax over logits in memory: Megatron's output layer, unchanged, then the row kernels."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from real_megatron.head import ops
from real_megatron.head.held import idle_counts
from real_megatron.head.ops import Kernels
from real_megatron.head.rows import GatherRows
from real_megatron.head.shard import all_gather_packed, vocabulary_shard


def gathered_log_softmax(
    logits: Tensor,
    rows: GatherRows,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    padded_vocab_size: int | None = None,
    values: Tensor | None = None,
    kernels: Kernels = "auto",
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits)[row, id] for each id that each row asks for.

    logits: [R, V_local], this rank's columns `[rank·V_local, (rank + 1)·V_local)` of the vocabulary; bf16, fp16, fp32
        or fp64; rows may be strided. Columns from `vocab_size` on are padding: no probability, gradient exactly 0.
    rows: R rows of ids, the same on every rank of `group`.
    vocab_size: true size of the vocabulary. padded_vocab_size: the padded one, to check the shape against.
    group: tensor-parallel group, None for one rank. Forward does one all-gather; backward communicates nothing and
        expects the same incoming gradient on every rank.
    values: float [nnz]; with it also returns Σ_j value_j · p_j of each row, [R], differentiable.
    kernels: "fused" = CUDA kernels or their C++ counterpart, "torch" = plain PyTorch, "auto" = fused if available.
    inplace_backward: overwrite the logits with their gradient, halving memory. Allowed if nothing else reads the logits
        after this call and backward runs once; otherwise HeldTensorError. Under torch.compile, whose memory planner
        may alias them, the gradient is a new tensor.

    Returns float32 [nnz] (float64 for float64 logits), the same bits on every rank; with `values` also [R].
    ValueError: shapes, devices or ids that do not fit, gathered (not vocabulary-parallel) logits at size > 1.
    RuntimeError: kernels="fused" where there are none.
    Source: docs/mathematics.md.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"logits must be [rows, local columns], got {list(logits.shape)}: flatten the leading dimensions"
        )
    check_rows(logits.shape[0], logits, "logits", rows)
    if values is not None and (values.shape != rows.ids.shape or values.device != rows.device):
        raise ValueError(
            f"values must be [nnz = {rows.nnz}] on {rows.device}, got {[*values.shape]} on {values.device}"
        )
    if values is not None and values.requires_grad:
        raise ValueError("values must not require a gradient: none is computed for them; pass values.detach()")
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_backward=True needs logits computed by a layer; these are a leaf tensor")
    if inplace_backward and not torch.compiler.is_compiling():
        idle_counts()
    shard = vocabulary_shard(logits.shape[1], rows, vocab_size, padded_vocab_size, group)
    csr = (rows.ids, rows.offsets, rows.row_index, values)
    packed = ops.head_stats(logits.detach(), *csr, *shard, kernels)
    gathered = all_gather_packed(packed, group)
    log_probs, expectation, _, _ = ops.head_log_probs(logits, gathered, *csr, *shard, inplace_backward, kernels)
    return log_probs if values is None else (log_probs, expectation)


def check_rows(num_rows: int, tensor: Tensor, name: str, rows: GatherRows) -> None:
    """ValueError unless `tensor`, which stands for `num_rows` rows in all, is floating point and matches `rows`."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if num_rows != rows.num_rows:
        raise ValueError(f"{name} has {num_rows} rows, GatherRows has {rows.num_rows}")
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device}, GatherRows on {rows.device}: use rows.to({name}.device)")
