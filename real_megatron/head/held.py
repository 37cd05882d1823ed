"""Check of the in-place backward: no other reference may exist to a tensor whose storage is about to be overwritten."""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor


class HeldTensorError(RuntimeError):
    """The logits cannot be overwritten with their gradient, because something else could still read them."""


def forbid_other_holders(saved: Tensor) -> None:
    """Raise HeldTensorError unless autograd alone holds `saved` (a tensor a caller got from `ctx.saved_tensors` and
    keeps in exactly one local variable).

    Sees Python references to the tensor, to the tensor it is a view of and to its storage, and aliases of the storage
    (views, `detach()`, `.data`). Tensors that another autograd node saved need no check here: their version
    counter moves with the write, and PyTorch itself refuses to use them.
    """
    idle = idle_counts()
    # One more on the stack than in `_Probe`, which counts its own local variable: the caller's.
    held = sys.getrefcount(saved) - 1 > idle["references"]
    base = saved._base
    if base is not None:
        held |= sys.getrefcount(base) > idle["base_references"]
    storage = saved.untyped_storage()
    held |= sys.getrefcount(storage) > idle["storage_references"]
    held |= torch._C._storage_Use_Count(storage._cdata) > idle["holders"] + (base is not None)
    if held:
        raise HeldTensorError(
            "inplace_backward=True would overwrite logits that something else still holds (a variable, a view, a "
            "detached copy): drop that reference before backward, or pass inplace_backward=False"
        )


class _Probe(torch.autograd.Function):
    """Counts the references to a tensor that is known to be held by autograd alone."""

    counts: dict[str, int] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        base = saved._base
        storage = saved.untyped_storage()
        _Probe.counts = {
            "references": sys.getrefcount(saved),
            "base_references": sys.getrefcount(base),
            "storage_references": sys.getrefcount(storage),
            # The view itself and the storage object that we made to look at it; its base comes on top.
            "holders": torch._C._storage_Use_Count(storage._cdata) - 1,
        }
        return grad.expand_as(saved)


@cache
def idle_counts() -> dict[str, int]:
    """The counts of an unheld tensor. Call once before any backward, so that none runs inside another."""
    # Measured, because the number of references that the interpreter and PyTorch hold themselves differs by version.
    with torch.enable_grad():
        x = torch.zeros(2, 2, requires_grad=True)
        out = _Probe.apply((x * 1).view(4))
        del x
        out.backward()
    return _Probe.counts
