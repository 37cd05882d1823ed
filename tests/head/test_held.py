"""The in-place backward refuses to overwrite logits that something else could still read, and a second backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from real_megatron.head import GatherRows, HeldTensorError, gathered_log_softmax

ROWS = GatherRows.from_lists([[1], [2, 0], [3]])


def flat_logits() -> Tensor:
    """Like Megatron's output layer, [s, b, V], then made [s·b, V]: a view of the layer's output."""
    weight = torch.randn(4, 5, requires_grad=True)
    return (torch.randn(3, 1, 5) @ weight.t()).flatten(0, 1)


def own_logits() -> Tensor:
    return torch.randn(3, 4, requires_grad=True) * 1


def loss(logits: Tensor) -> Tensor:
    return gathered_log_softmax(logits, ROWS, vocab_size=4, inplace_backward=True).sum()


@pytest.mark.parametrize("make", [flat_logits, own_logits])
def test_unheld_logits_pass(make: Callable[[], Tensor]) -> None:
    for _ in range(2):
        loss(make()).backward()


@pytest.mark.parametrize("make", [flat_logits, own_logits])
@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: {"logits": [x]},
        lambda x: x.detach(),
        lambda x: x.data,
        lambda x: x[0],
        lambda x: x.untyped_storage(),
        lambda x: x._base if x._base is not None else x,
    ],
    ids=["variable", "container", "detached", "data", "slice", "storage", "base"],
)
def test_a_second_holder_is_refused(make: Callable[[], Tensor], hold: Callable[[Tensor], object]) -> None:
    logits = make()
    held = hold(logits)
    total = loss(logits)
    del logits
    with pytest.raises(HeldTensorError, match="still holds"):
        total.backward(retain_graph=True)
    # Nothing was overwritten, so once the holder is gone backward works.
    del held
    total.backward()


def test_a_second_backward_is_refused() -> None:
    total = loss(own_logits())
    total.backward(retain_graph=True)
    with pytest.raises(HeldTensorError, match="second backward"):
        total.backward()


def test_an_operator_that_saved_the_logits_cannot_use_them() -> None:
    # exp_ saves its output; the logits' version has moved by the time it wants to read it.
    leaf = torch.randn(3, 4, requires_grad=True)
    logits = leaf * 1
    squares = logits.pow(2)
    total = loss(logits)
    del logits
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


def test_without_inplace_everything_is_allowed() -> None:
    logits = own_logits()
    total = gathered_log_softmax(logits, ROWS, vocab_size=4).sum()
    total.backward(retain_graph=True)
    total.backward()
