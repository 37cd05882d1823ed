"""Gathered log-softmax fused with the LM-head GEMM: the logits never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from real_megatron.head.chunks import Chunks, plan_chunks
from real_megatron.head.gemm import add_mm, add_weight_grad, mm
from real_megatron.head.logits import check_rows
from real_megatron.head.ops import Kernels, row_kernels
from real_megatron.head.rows import GatherRows
from real_megatron.head.shard import (
    VocabularyShard,
    all_gather_packed,
    merge_packed,
    reduce_scatter_rows,
    vocabulary_shard,
)
from real_megatron.head.torch_kernels import accumulate_dtype

# Measured: on a CPU a chunk that stays in the last-level cache is faster than a larger one.
CPU_CHUNK_BYTES = 16 << 20

Reduction = Literal["none", "all_reduce", "reduce_scatter"]


@torch.compiler.disable
def linear_gathered_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    rows: GatherRows,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    padded_vocab_size: int | None = None,
    memory_budget_bytes: int = 256 << 20,
    fp32_logits: bool = False,
    row_scale: Tensor | None = None,
    kernels: Kernels = "auto",
    reduce_dhidden: Reduction = "none",
) -> Tensor:
    """log softmax(row_scale · (hidden @ weightᵀ))[row, id] for each id that each row asks for, chunk by chunk.

    Forward computes the logits of one vocabulary chunk at a time and keeps only row statistics. Backward computes them
    again, turns them into their gradient in place and adds to dhidden (float32) and to the chunk's rows of dweight.

    hidden: [R, H]. weight: [V_local, H], same dtype; rank r of `group` holds rows `[r·V_local, (r + 1)·V_local)`.
    rows, vocab_size, group, padded_vocab_size, kernels: as in `gathered_log_softmax`.
    memory_budget_bytes: bound on the buffers beside inputs, outputs and gradients.
    fp32_logits: keep the logits in float32 instead of rounding them to the dtype of the GEMM's inputs (in bf16 one
        ulp is 0.125 at |logit| ≥ 16); the backward GEMMs still take the input dtype.
    row_scale: [R], a constant factor of each row's logits, such as 1 / temperature; default: 1. Scaled hidden states
        would be rounded to their dtype, and so would be the logits.
    reduce_dhidden: "none": the gradient of `hidden` is this rank's contribution alone, and a copy- or gather-region
        around the call reduces it. "all_reduce": summed over `group`. "reduce_scatter" (sequence parallelism): `hidden`
        is this rank's [R / size, H] shard of the rows, gathered here, in forward and again in backward, and its
        gradient is reduce-scattered. Both reductions overlap the last weight-gradient GEMM.

    The weight gradient is added to `weight.main_grad` where the parameter has one (Megatron's convention), tied
    embeddings included, else returned to autograd. Returns float32 [nnz] (float64 for float64), the same on every rank.
    ValueError: what `gathered_log_softmax` refuses, unequal dtypes, a budget too small for one row of a chunk.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [R, H] and weight [V_local, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}: make them equal"
        )
    if reduce_dhidden not in ("none", "all_reduce", "reduce_scatter"):
        raise ValueError(f"reduce_dhidden must be 'none', 'all_reduce' or 'reduce_scatter', got {reduce_dhidden!r}")
    if group is None or group.size() == 1:
        reduce_dhidden = "none"
    size = group.size() if group is not None and reduce_dhidden == "reduce_scatter" else 1
    check_rows(hidden.shape[0] * size, hidden, "hidden", rows)
    shard = vocabulary_shard(weight.shape[0], rows, vocab_size, padded_vocab_size, group)
    if row_scale is not None and row_scale.shape != (rows.num_rows,):
        raise ValueError(f"row_scale must be [R = {rows.num_rows}], got {list(row_scale.shape)}")
    call = _Call(rows, shard, group, memory_budget_bytes, fp32_logits, row_scale, kernels, reduce_dhidden)
    return _LinearGathered.apply(hidden, weight, call)


@dataclass(frozen=True)
class _Call:
    """The constants of one call."""

    rows: GatherRows
    shard: VocabularyShard
    group: ProcessGroup | None
    budget: int
    fp32_logits: bool
    row_scale: Tensor | None
    kernels: Kernels
    reduction: Reduction

    def logits_dtype(self, hidden: Tensor) -> torch.dtype:
        return torch.float32 if self.fp32_logits and hidden.element_size() < 4 else hidden.dtype

    def full_hidden(self, hidden: Tensor) -> Tensor:
        """All rows: under sequence parallelism gathered again in backward rather than kept."""
        if self.reduction != "reduce_scatter":
            return hidden
        return all_gather_packed(hidden.reshape(-1), self.group).view(-1, hidden.shape[1])

    def scale_rows(self, x: Tensor, start: int, end: int) -> None:
        """Multiply a chunk of logits, or of their gradient, by the factors of its rows, in place."""
        if self.row_scale is not None:
            x.mul_(self.row_scale[start:end].unsqueeze(1))

    def chunks(self, hidden: Tensor, backward: bool) -> Chunks:
        """The plan of a pass, by what it costs there. ValueError if the budget is too small."""
        dtype, half = self.logits_dtype(hidden), hidden.element_size() < 4
        bytes_per_logit = dtype.itemsize
        bytes_per_row = bytes_per_column = 0
        if half and not hidden.is_cuda:  # GEMMs with a float32 result upcast their inputs here
            bytes_per_row = bytes_per_column = 4 * hidden.shape[1]
            bytes_per_logit += 4 if backward else 0
        if backward:
            bytes_per_row += 4 * hidden.shape[1] if half else 0  # the float32 sum of dhidden
            bytes_per_logit += hidden.element_size() if dtype != hidden.dtype else 0  # dlogits as a GEMM input
        preferred = None if hidden.is_cuda else CPU_CHUNK_BYTES
        costs = (bytes_per_logit, bytes_per_row, bytes_per_column)
        return plan_chunks(hidden.shape[0], self.shard.columns, *costs, self.budget, preferred)

    def plan(self, hidden: Tensor, backward: bool) -> tuple[list[_RowChunk], list[_Bounds], Tensor]:
        """Chunks of rows, chunks of vocabulary columns, and the flat buffer for the logits of one chunk of both."""
        chunks = self.chunks(hidden, backward)
        bounds = _bounds(hidden.shape[0], chunks.rows)
        row_chunks = [_RowChunk(*b, self.rows if len(bounds) == 1 else self.rows.slice(*b)) for b in bounds]
        buffer = hidden.new_empty(chunks.rows * chunks.columns, dtype=self.logits_dtype(hidden))
        return row_chunks, _bounds(self.shard.columns, chunks.columns), buffer


class _RowChunk(NamedTuple):
    start: int
    end: int
    rows: GatherRows


_Bounds = tuple[int, int]


def _bounds(length: int, step: int) -> list[_Bounds]:
    return [(start, min(start + step, length)) for start in range(0, length, max(step, 1))]


class _LinearGathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> Tensor:
        rows, shard = call.rows, call.shard
        full = call.full_hidden(hidden)
        if any(ctx.needs_input_grad):
            call.chunks(full, backward=True)  # raises for too small a budget now rather than in backward
        row_chunks, column_chunks, buffer = call.plan(full, backward=False)
        kernel = row_kernels(call.kernels, full.device, buffer.dtype)
        by_chunk = []
        for start, end, asked in row_chunks:
            seen = _nothing_seen(asked, buffer)
            for c0, c1 in column_chunks:
                z = _view(buffer, end - start, c1 - c0)
                mm(full[start:end], weight[c0:c1].t(), out=z)
                call.scale_rows(z, start, end)
                columns = VocabularyShard(shard.first_id + c0, c1 - c0)
                packed = kernel.stats(z, asked.ids, asked.offsets, asked.row_index, None, columns)
                merged = merge_packed(torch.stack([seen, packed]), end - start, asked.nnz, has_values=False)
                seen = torch.cat([merged.max, merged.sum, merged.logits])
            by_chunk.append(seen.split([end - start, end - start, asked.nnz]))
        del buffer
        by_kind = [values for kind in zip(*by_chunk, strict=True) for values in kind]
        local = torch.cat(by_kind) if by_kind else full.new_empty(0, dtype=accumulate_dtype(full.dtype))
        merged = merge_packed(all_gather_packed(local, call.group), rows.num_rows, rows.nnz, has_values=False)
        log_probs = merged.log_probs(rows.row_index)
        ctx.save_for_backward(hidden, weight, log_probs, merged.max, merged.sum)
        ctx.call = call
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, log_probs, maximum, total = ctx.saved_tensors
        call: _Call = ctx.call
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        full = call.full_hidden(hidden)
        row_chunks, column_chunks, buffer = call.plan(full, backward=True)
        kernel = row_kernels(call.kernels, full.device, buffer.dtype)
        dhidden = torch.zeros_like(full) if wants_hidden else None
        main_grad = getattr(weight, "main_grad", None)
        dweight = None
        if wants_weight:
            dweight = torch.zeros_like(weight) if main_grad is None else main_grad
        reduction = _Reduction(call)
        first = 0
        for start, end, asked in row_chunks:
            entries = slice(first, first + asked.nnz)
            first += asked.nnz
            kept = (log_probs[entries], maximum[start:end], total[start:end], grad[entries].contiguous())
            x = full[start:end]
            dx = None
            if dhidden is not None:
                dx = dhidden[start:end] if x.element_size() >= 4 else torch.zeros_like(x, dtype=torch.float32)
            for c0, c1 in column_chunks:
                z = _view(buffer, end - start, c1 - c0)
                mm(x, weight[c0:c1].t(), out=z)
                call.scale_rows(z, start, end)
                columns = VocabularyShard(call.shard.first_id + c0, c1 - c0)
                kernel.dlogits(z, z, *kept, asked.ids, asked.offsets, asked.row_index, columns)
                call.scale_rows(z, start, end)
                dz = z.to(x.dtype)
                if dhidden is not None and dx is not None:
                    add_mm(dx, dz, weight[c0:c1])
                    if c1 == call.shard.columns:
                        dhidden[start:end] = dx
                        if end == len(full):  # complete: its reduction overlaps the GEMM that follows
                            reduction.start(dhidden)
                if dweight is not None:
                    add_mm(dweight[c0:c1], dz.t(), x)
        if dhidden is not None:
            dhidden = reduction.finish(dhidden)
        return dhidden, add_weight_grad(weight, main_grad, dweight) if wants_weight else None, None


class _Reduction:
    """The reduction of dhidden over ranks: started as soon as dhidden is complete, awaited at the end."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.result: Tensor | None = None
        self.work: dist.Work | None = None

    def start(self, dhidden: Tensor) -> Tensor:
        """Returns what will hold the result."""
        result, group = dhidden, self.call.group
        if group is not None and self.call.reduction == "all_reduce":
            self.work = dist.all_reduce(dhidden, group=group, async_op=True)
        elif group is not None and self.call.reduction == "reduce_scatter":
            result, self.work = reduce_scatter_rows(dhidden, group)
        self.result = result
        return result

    def finish(self, dhidden: Tensor) -> Tensor:
        # Not started where this rank holds padding alone; its peers still wait for its zeros.
        result = self.start(dhidden) if self.result is None else self.result
        if self.work is not None:
            self.work.wait()
        return result


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _nothing_seen(rows: GatherRows, like: Tensor) -> Tensor:
    """Packed statistics of no columns at all, the neutral element of the merge."""
    packed = like.new_full((2 * rows.num_rows + rows.nnz,), -torch.inf, dtype=accumulate_dtype(like.dtype))
    packed[rows.num_rows : 2 * rows.num_rows] = 0
    return packed
