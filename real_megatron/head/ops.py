"""The row kernels as PyTorch operators (`torch.library.custom_op`): eager, autograd, meta tensors, torch.compile.

head_stats       local logits shard                → packed row statistics, to be all-gathered
head_log_probs   gathered statistics               → log-probabilities, expectation; differentiable in `logits`
head_dlogits     what forward saved, the gradients → d loss / d logits, in a new tensor
head_dlogits_    the same, written over `logits`
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from real_megatron.head import native, torch_kernels
from real_megatron.head.held import HeldTensorError, forbid_other_holders
from real_megatron.head.shard import VocabularyShard, merge_packed

Kernels = Literal["torch", "fused", "auto"]
"""Which row kernels: `fused`, compiled (CUDA, or C++ on a CPU); `torch`, plain PyTorch; `auto`, fused if available."""


class RowKernels(Protocol):
    """What the modules `torch_kernels` and `native` both define."""

    def stats(
        self,
        logits: Tensor,
        ids: Tensor,
        offsets: Tensor,
        row_index: Tensor,
        values: Tensor | None,
        shard: VocabularyShard,
    ) -> Tensor:
        """See `torch_kernels.stats`."""
        ...

    def dlogits(
        self,
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
        """See `torch_kernels.dlogits`."""
        ...


def row_kernels(kernels: str, device: torch.device, dtype: torch.dtype) -> RowKernels:
    """The module of this choice (`Kernels`) for tensors of this device and dtype: `torch_kernels` or `native`.

    ValueError for another choice; RuntimeError, which says why, where `fused` is not available.
    """
    if kernels not in ("torch", "fused", "auto"):
        raise ValueError(f"kernels must be 'torch', 'fused' or 'auto', got {kernels!r}")
    if kernels == "torch":
        return torch_kernels
    reason = native.unsupported(device, dtype)
    if reason is None:
        return native
    if kernels == "fused":
        raise RuntimeError(f"kernels='fused' is not available here: {reason}")
    return torch_kernels


@torch.library.custom_op("real_megatron::head_stats", mutates_args=())
def head_stats(
    logits: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    values: Tensor | None,
    first_id: int,
    columns: int,
    kernels: str,
) -> Tensor:
    implementation = row_kernels(kernels, logits.device, logits.dtype)
    return implementation.stats(logits, ids, offsets, row_index, values, VocabularyShard(first_id, columns))


@head_stats.register_fake
def _(logits: Tensor, ids: Tensor, offsets: Tensor, row_index: Tensor, values: Tensor | None, *_: int | str) -> Tensor:
    length = (2 if values is None else 3) * logits.shape[0] + ids.shape[0]
    return logits.new_empty(length, dtype=torch_kernels.accumulate_dtype(logits.dtype))


@torch.library.custom_op("real_megatron::head_dlogits", mutates_args=())
def head_dlogits(
    logits: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    first_id: int,
    columns: int,
    kernels: str,
) -> Tensor:
    out = torch.empty_like(logits)
    implementation = row_kernels(kernels, logits.device, logits.dtype)
    shard = VocabularyShard(first_id, columns)
    implementation.dlogits(logits, out, log_probs, maximum, total, grad, ids, offsets, row_index, shard)
    return out


@head_dlogits.register_fake
def _(logits: Tensor, *_: Tensor | int | str) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("real_megatron::head_dlogits_", mutates_args=("logits",))
def head_dlogits_(
    logits: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    first_id: int,
    columns: int,
    kernels: str,
) -> None:
    implementation = row_kernels(kernels, logits.device, logits.dtype)
    shard = VocabularyShard(first_id, columns)
    implementation.dlogits(logits, logits, log_probs, maximum, total, grad, ids, offsets, row_index, shard)


@head_dlogits_.register_fake
def _(logits: Tensor, *_: Tensor | int | str) -> None:
    return None


@torch.library.custom_op("real_megatron::head_log_probs", mutates_args=())
def head_log_probs(
    logits: Tensor,
    gathered: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    values: Tensor | None,
    first_id: int,
    columns: int,
    inplace_backward: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ log-probabilities [nnz], expectation [R] (empty without values), merged max [R], merged sum of exp [R]."""
    merged = merge_packed(gathered, logits.shape[0], ids.numel(), values is not None)
    expectation = merged.max.new_empty(0) if merged.expectation is None else merged.expectation
    return merged.log_probs(row_index), expectation, merged.max, merged.sum


@head_log_probs.register_fake
def _(
    logits: Tensor,
    gathered: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    values: Tensor | None,
    *_: int | bool | str,
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    sizes = (ids.shape[0], 0 if values is None else rows, rows, rows)
    return tuple(gathered.new_empty(size) for size in sizes)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, ids, offsets, row_index, values, first_id, columns, inplace_backward, kernels = inputs
    log_probs, _, maximum, total = output
    ctx.save_for_backward(logits, log_probs, maximum, total, ids, offsets, row_index, values)
    ctx.shard, ctx.inplace, ctx.kernels, ctx.consumed = (first_id, columns), inplace_backward, kernels, False


def _backward(ctx: Any, grad: Tensor, grad_expectation: Tensor, _max: Tensor, _sum: Tensor) -> tuple:
    if ctx.consumed:
        raise HeldTensorError(
            "second backward through gathered_log_softmax(inplace_backward=True): the first one overwrote the logits "
            "with their gradient; pass inplace_backward=False to go back more than once"
        )
    logits, log_probs, maximum, total, ids, offsets, row_index, values = ctx.saved_tensors
    if values is not None:
        # expectation = Σ_j value_j · exp(log_prob_j), so its gradient joins that of the log-probabilities.
        grad = grad + grad_expectation[row_index] * values.to(grad.dtype) * log_probs.exp()
    arguments = (log_probs, maximum, total, grad.contiguous(), ids, offsets, row_index, *ctx.shard, ctx.kernels)
    # Torch 2.10 and 2.11 trace a compiled backward without saying so, on tensors of this kind.
    compiling = torch.compiler.is_compiling() or isinstance(logits, FunctionalTensor)
    if ctx.inplace and not compiling:
        forbid_other_holders(logits)
        ctx.consumed = True
        torch.ops.real_megatron.head_dlogits_(logits, *arguments)
        dlogits = logits.detach()
    else:
        dlogits = torch.ops.real_megatron.head_dlogits(logits, *arguments)
    return dlogits, *[None] * 9


head_log_probs.register_autograd(_backward, setup_context=_setup_context)
