"""The vocabulary split over 1, 2 and 4 gloo ranks gives what one rank gives, bit for bit the same on every rank."""

import pytest
import torch
from torch import Tensor

from tests.support import head_ranks
from tests.support.head_cases import (
    Case,
    assert_dlogits_close,
    assert_log_probs_close,
    random_case,
    reference,
    row_grad,
)
from tests.support.ranks import run_ranks


def run(case: Case, ranks: int, kernels: str, inplace: bool = True, with_values: bool = False) -> dict[str, Tensor]:
    values = (case.values, case.grad_expectation) if with_values else ()
    results = run_ranks(
        ranks, head_ranks.logits_case, case.logits, case.lists, case.grad, case.vocab_size, kernels, inplace, *values
    )
    for result in results[1:]:
        for key in result.keys() - {"dlogits"}:
            assert torch.equal(result[key], results[0][key]), f"{key} differs between ranks"
    return results[0] | {"dlogits": torch.cat([result["dlogits"] for result in results], dim=1)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("torch", torch.float32), ("fused", torch.float32), ("fused", torch.bfloat16)],
    ids=["torch-fp32", "fused-fp32", "fused-bf16"],
)
def test_matches_float64(ranks: int, kernels: str, dtype: torch.dtype) -> None:
    # Shards of 35 columns start misaligned; the last rank's has 7 columns of padding.
    case = random_case(11, 133, 140, dtype)
    actual = run(case, ranks, kernels, with_values=True)
    expected = reference(case, with_values=True)
    assert_log_probs_close(actual["log_probs"], expected["log_probs"])
    assert_dlogits_close(actual["dlogits"], expected["dlogits"], row_grad(case, with_values=True))
    assert (actual["dlogits"][:, 133:] == 0).all()
    torch.testing.assert_close(actual["expectation"].double(), expected["expectation"], rtol=0, atol=5e-6)


def test_float64_is_exact_over_ranks() -> None:
    case = random_case(6, 50, 52, torch.float64)
    expected = reference(case)
    for ranks in (2, 4):
        actual = run(case, ranks, "torch", inplace=False)
        for key in ("log_probs", "dlogits"):
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_digits_split_over_ranks_and_the_answer_on_each(kernels: str) -> None:
    # Five "digits" that straddle the boundary of ranks 1 and 2; then one id on each of four ranks in turn.
    case = random_case(5, 64, 64)
    case.lists = [[30, 31, 32, 33, 34], [3], [20], [40], [60]]
    case.grad, case.values = torch.tensor([0.2, -1.0, 2.0, 0.5, -0.3, 1.0, -1.0, 3.0, 0.5]), torch.arange(1.0, 10.0)
    actual = run(case, 4, kernels, with_values=True)
    expected = reference(case, with_values=True)
    assert_log_probs_close(actual["log_probs"], expected["log_probs"])
    assert_dlogits_close(actual["dlogits"], expected["dlogits"], row_grad(case, with_values=True))


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_a_rank_of_padding_or_of_minus_infinity_adds_nothing(kernels: str) -> None:
    # Four shards of 16 columns: rank 1 sees -inf alone, rank 3 padding alone (vocabulary of 40).
    case = random_case(4, 40, 64)
    case.logits[:, 16:32] = -torch.inf
    case.lists = [[1], [35, 2], [17], [39]]
    case.grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 2.0])
    actual = run(case, 4, kernels)
    expected = reference(case)
    assert actual["log_probs"][3] == -torch.inf
    assert_log_probs_close(actual["log_probs"], expected["log_probs"])
    assert_dlogits_close(actual["dlogits"], expected["dlogits"], row_grad(case))


def test_no_rows() -> None:
    case = Case(torch.empty(0, 8), [], 8, torch.empty(0), torch.empty(0), torch.empty(0))
    assert run(case, 2, "torch")["log_probs"].shape == (0,)


def test_gathered_logits_are_refused() -> None:
    for message in run_ranks(2, head_ranks.gathered_logits_error, 40, 40, None):
        assert "look like gathered logits" in message
    # The padded size, if named, settles it: 64 columns are the shard of a vocabulary padded to 128, not to 64.
    for message in run_ranks(2, head_ranks.gathered_logits_error, 40, 64, 64):
        assert "64 local columns on 2 ranks are not the padded vocabulary of 64" in message
    assert run_ranks(2, head_ranks.gathered_logits_error, 40, 64, 128) == ["", ""]
    assert run_ranks(2, head_ranks.gathered_logits_error, 40, 20, None) == ["", ""]
