"""GEMMs of the linear form: inputs in the model's dtype, results and sums in that dtype or in float32."""

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where `out` may be float32 over bf16 inputs (accumulated and kept in float32)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in the dtype of `out`."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def add_weight_grad(weight: Tensor, main_grad: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """What the backward of a layer returns for `weight` once its gradient has been added to `main_grad` (or is `grad`).

    Megatron's convention (`linear_with_grad_accumulation_and_async_allreduce`): mark the parameter, and return a dummy,
    so that its gradient hooks still run in the main thread; zeros where the parameter says (`zero_out_wgrad`) that
    another layer, such as a tied embedding, adds to the same `.grad`.
    """
    if main_grad is None:
        return grad
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
