"""What each rank does in the multi-rank tests of the head. Module-level functions, so that workers can import them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.head import GatherRows, gathered_log_softmax, linear_gathered_log_softmax


def shard_of(full: Tensor, dim: int = -1) -> Tensor:
    """This rank's shard of `full` along `dim`."""
    return full.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def logits_case(
    logits: Tensor,
    lists: list[list[int]],
    grad: Tensor,
    vocab_size: int,
    kernels: str,
    inplace: bool,
    values: Tensor | None = None,
    grad_expectation: Tensor | None = None,
) -> dict[str, Tensor]:
    """Forward and backward on this rank's shard of padded `logits`."""
    local = shard_of(logits).requires_grad_()
    rows = GatherRows.from_lists(lists)
    arguments: dict[str, Any] = dict(vocab_size=vocab_size, group=dist.group.WORLD, kernels=kernels, values=values)
    out = gathered_log_softmax(local * 1, rows, inplace_backward=inplace, **arguments)
    log_probs, expectation = out if values is not None else (out, None)
    outputs = [log_probs] if expectation is None else [log_probs, expectation]
    grads = [grad] if expectation is None else [grad, grad_expectation]
    torch.autograd.backward(outputs, grads)
    result = {"log_probs": log_probs.detach(), "dlogits": local.grad}
    if expectation is not None:
        result["expectation"] = expectation.detach()
    return result


def linear_case(
    hidden: Tensor,
    weight: Tensor,
    lists: list[list[int]],
    grad: Tensor,
    vocab_size: int,
    main_grad: bool,
    options: dict,
) -> dict[str, Tensor]:
    """Forward and backward of the linear form on this rank's shard of padded `weight`."""
    scatter = options.get("reduce_dhidden") == "reduce_scatter"
    local_hidden = (shard_of(hidden, 0) if scatter else hidden.clone()).requires_grad_()
    local_weight = torch.nn.Parameter(shard_of(weight, 0))
    if main_grad:
        local_weight.main_grad = torch.ones(local_weight.shape, dtype=torch.promote_types(torch.float32, weight.dtype))
        local_weight.grad_added_to_main_grad = False
    out = linear_gathered_log_softmax(
        local_hidden,
        local_weight,
        GatherRows.from_lists(lists),
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        **options,
    )
    out.backward(grad)
    dweight = local_weight.main_grad - 1 if main_grad else local_weight.grad
    return {"log_probs": out.detach(), "dhidden": local_hidden.grad, "dweight": dweight}


def gathered_logits_error(vocab_size: int, columns: int, padded_vocab_size: int | None) -> str:
    """The message with which logits of `columns` columns are refused, or an empty string."""
    rows = GatherRows.from_lists([[0], [1]])
    try:
        gathered_log_softmax(
            torch.zeros(2, columns),
            rows,
            vocab_size=vocab_size,
            group=dist.group.WORLD,
            padded_vocab_size=padded_vocab_size,
        )
    except ValueError as error:
        return str(error)
    return ""
