"""Cases and error bounds that the tests of the head share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from real_megatron.head import GatherRows, reference_gathered_log_softmax

EPS32 = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """Padded logits [R, V_padded] with garbage in the padding, ids per row, and an incoming gradient per id."""

    logits: Tensor
    lists: list[list[int]]
    vocab_size: int
    grad: Tensor
    values: Tensor
    grad_expectation: Tensor

    @property
    def rows(self) -> GatherRows:
        return GatherRows.from_lists(self.lists)


def random_case(
    num_rows: int,
    vocab_size: int,
    padded_vocab_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_ids: int = 5,
    scale: float = 3.0,
) -> Case:
    """Rows that ask for 0 … max_ids ids, repeats included; gradients of both signs, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = (scale * normal(num_rows, padded_vocab_size)).to(dtype)
    logits[:, vocab_size:] = 60.0  # would take all probability if it were not masked
    counts = torch.randint(0, max_ids + 1, (num_rows,), generator=generator).tolist()
    lists = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in counts]
    for ids in lists[::3]:
        if len(ids) > 1:
            ids[-1] = ids[0]
    nnz = sum(counts)
    grad = normal(nnz) * (torch.rand(nnz, generator=generator) > 0.2)
    wide = dtype if dtype == torch.float64 else torch.float32
    return Case(logits, lists, vocab_size, grad.to(wide), normal(nnz).to(wide), normal(num_rows).to(wide))


def reference(case: Case, with_values: bool = False) -> dict[str, Tensor]:
    """Float64 results on the very same (already rounded) logits; the gradient of padding is zero."""
    logits = case.logits.detach().double().requires_grad_()
    rows = case.rows
    log_probs = reference_gathered_log_softmax(logits[:, : case.vocab_size], rows)
    outputs, grads = [log_probs], [case.grad.double()]
    result = {"log_probs": log_probs.detach()}
    if with_values:
        weighted = torch.zeros(rows.num_rows, dtype=torch.float64)
        expectation = weighted.index_add(0, rows.row_index, case.values.double() * log_probs.exp())
        outputs.append(expectation)
        grads.append(case.grad_expectation.double())
        result["expectation"] = expectation.detach()
    torch.autograd.backward(outputs, grads)
    result["dlogits"] = logits.grad
    return result


def assert_log_probs_close(actual: Tensor, expected: Tensor) -> None:
    """|error| ≤ eps32 · (16 + 2·|log p|), whatever the dtype and the size of the logits.

    Logits are read exactly. z - max and (z - max) - log(sum) round at the size of the result (2·|log p|); the sum, of
    positive terms of a few eps each, added in lanes and then merged, is within 16 eps in relative terms.
    """
    _assert_within(actual, expected, EPS32 * (16 + 2 * expected.nan_to_num(neginf=0).abs()))


def assert_dlogits_close(actual: Tensor, expected: Tensor, row_grad: Tensor) -> None:
    """|error| ≤ half an ulp of the dtype · |d| (one rounding of the result) + 32·eps32 · Σ_j |g_j| (the arithmetic),
    and in fp16 half of the smallest subnormal. row_grad: [R, 1], Σ_j |g_j| of each row."""
    info = torch.finfo(actual.dtype)
    smallest = info.smallest_normal * info.eps / 2
    _assert_within(actual, expected, 0.51 * info.eps * expected.abs() + 32 * EPS32 * row_grad + smallest)


def row_grad(case: Case, with_values: bool = False) -> Tensor:
    """Σ_j |g_j| per row, [R, 1]; with values the gradient that comes through the expectation is added."""
    rows = case.rows
    size = case.grad.double().abs()
    if with_values:
        size = size + (case.values.double() * case.grad_expectation.double()[rows.row_index]).abs()
    return torch.zeros(rows.num_rows, dtype=torch.float64).index_add(0, rows.row_index, size).unsqueeze(1)


def _assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    actual = actual.detach().cpu().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = (actual - expected).abs().masked_fill(same, 0)
    wrong = ~(error <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} outside the bound; at {at}: {actual[at].item()} instead of "
            f"{expected[at].item()}, error {error[at].item():.3g} > {bound[at].item():.3g}"
        )
