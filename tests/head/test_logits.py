"""Gathered log-softmax over logits in memory against the float64 definition: all kernels, dtypes and edge cases."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from real_megatron.head import GatherRows, gathered_log_softmax, ops, reference_gathered_log_softmax
from real_megatron.head.shard import VocabularyShard
from tests.support.head_cases import (
    Case,
    assert_dlogits_close,
    assert_log_probs_close,
    random_case,
    reference,
    row_grad,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(case: Case, kernels: tuple[str, str], inplace: bool = False, with_values: bool = False) -> dict[str, Tensor]:
    choice, device = kernels
    leaf = case.logits.to(device).requires_grad_()
    rows = case.rows.to(device)
    values = case.values.to(device) if with_values else None
    out = gathered_log_softmax(
        leaf * 1, rows, vocab_size=case.vocab_size, values=values, kernels=choice, inplace_backward=inplace
    )
    log_probs, *expectation = out if with_values else (out,)
    grads = [case.grad.to(device), case.grad_expectation.to(device)]
    torch.autograd.backward([log_probs, *expectation], grads[: 1 + len(expectation)])
    result = {"log_probs": log_probs.detach(), "dlogits": leaf.grad}
    return result | dict(zip(("expectation",), (e.detach() for e in expectation), strict=False))


def check(case: Case, actual: dict[str, Tensor], with_values: bool = False) -> None:
    expected = reference(case, with_values)
    assert_log_probs_close(actual["log_probs"], expected["log_probs"])
    assert_dlogits_close(actual["dlogits"], expected["dlogits"], row_grad(case, with_values))
    assert (actual["dlogits"][:, case.vocab_size :] == 0).all()
    if with_values:
        # A sum of at most max_ids terms of size ≤ |v|, each off by a few eps.
        torch.testing.assert_close(actual["expectation"].cpu().double(), expected["expectation"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_matches_float64(kernels: tuple[str, str], dtype: torch.dtype, inplace: bool) -> None:
    # 1,037 columns: not a multiple of any vector; 3 padded columns; rows of the padded logits start misaligned.
    case = random_case(9, 1037, 1040 if inplace else 1043, dtype)
    check(case, run(case, kernels, inplace))


def test_matches_float64_in_float64() -> None:
    case = random_case(9, 133, 140, torch.float64)
    actual = run(case, ("torch", "cpu"))
    expected = reference(case)
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_tiles(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    # Three tiles of 16,384 bfloat16 columns (five of 8,192 float32 ones), with a last one that is not full.
    case = random_case(3, 40_003, 40_064, dtype, max_ids=40)
    check(case, run(case, kernels, inplace=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_just_past_a_tile(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    # Eight rows of odd width start at every alignment, so the 16-byte vectors of some end before the second tile
    # begins, which then has no column of its own. Ids at the boundary and in the tail.
    tile = 8192 if dtype == torch.float32 else 16_384
    for extra in (1, 3, 7):
        columns = tile + extra
        case = random_case(8, columns, columns, dtype)
        case.lists = [[columns - 1, tile - 1, tile, columns - 2, 0]] * 8
        case.grad = torch.linspace(-1, 2, 40)
        check(case, run(case, kernels, inplace=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_padding_is_all_zeroed(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    # 600 columns of padding, more than two for each of a CUDA block's 256 threads.
    case = random_case(3, 40, 640, dtype)
    check(case, run(case, kernels, inplace=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_a_row_is_written(kernels: tuple[str, str], dtype: torch.dtype, inplace: bool) -> None:
    # Rows with a gap between them, of which the kernels know every alignment; ids of the next shard are asked for too.
    kernel = ops.row_kernels(kernels[0], torch.device(kernels[1]), dtype)
    tile = 8192 if dtype == torch.float32 else 16_384
    rows, padding = 8, 5
    for columns in (3, 40, tile - 1, tile + 1, tile + 3):
        width, stride = columns + padding, columns + padding + 10
        buffers = [torch.full((rows * stride + 16,), 77.0, dtype=dtype, device=kernels[1]) for _ in range(2)]
        logits, other = (b.as_strided((rows, width), (stride, 1), at) for b, at in zip(buffers, (1, 2), strict=True))
        case = random_case(rows, columns, width, dtype)
        logits.copy_(case.logits)
        case.lists = [[columns - 1, *range(columns, columns + 9), 0]] * rows
        asked, shard = case.rows.to(kernels[1]), VocabularyShard(0, columns)
        csr = (asked.ids, asked.offsets, asked.row_index)
        packed = kernel.stats(logits, *csr, None, shard)
        maximum, total, z = packed.split([rows, rows, asked.nnz])
        assert z.view(rows, -1)[:, 1:-1].isneginf().all()
        log_probs = z - maximum[asked.row_index] - total.log()[asked.row_index]
        grad = torch.linspace(-1, 2, asked.nnz, device=kernels[1])
        out = logits if inplace else other
        kernel.dlogits(logits, out, log_probs, maximum, total, grad, *csr, shard)
        assert (out[:, columns:] == 0).all()
        out.fill_(77.0)
        assert (buffers[0 if inplace else 1] == 77).all()


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_logits_far_from_zero(kernels: tuple[str, str], level: float) -> None:
    case = random_case(6, 500, 512)
    case.logits[:, :500] += level
    check(case, run(case, kernels))


def test_a_tail_is_not_a_logit_of_zero(kernels: tuple[str, str]) -> None:
    # 515 columns of -90: columns counted as 0 would take all probability, or push log-probabilities above 0.
    logits = torch.full((2, 515), -90.0)
    case = Case(logits, [[0, 514], [7]], 515, torch.tensor([1.0, -1.0, 2.0]), torch.ones(3), torch.ones(2))
    actual = run(case, kernels)
    assert actual["log_probs"].tolist() == pytest.approx([-math.log(515)] * 3, rel=1e-6)
    check(case, actual)


def test_rows_of_mostly_minus_infinity(kernels: tuple[str, str]) -> None:
    case = random_case(4, 2200, 2200)
    case.logits[:, 5:2190] = -torch.inf
    case.logits[2:, :5] = -torch.inf  # the first blocks and tiles of these rows see nothing else
    case.lists, case.grad = [[1], [2190, 2], [2193], [500, 2199]], torch.tensor([1.0, 2.0, -1.0, 0.5, 0.0, 3.0])
    actual = run(case, kernels)
    assert actual["log_probs"][4] == -torch.inf
    assert (actual["dlogits"][:3, 5:2190] == 0).all()
    check(case, actual)


def test_a_row_of_minus_infinity_alone_is_nan(kernels: tuple[str, str]) -> None:
    # As in log_softmax. Other rows do not notice, and where there is no gradient there is none to spoil.
    case = random_case(3, 50, 50)
    case.logits[:2] = -torch.inf
    case.lists, case.grad = [[3], [3], [4]], torch.tensor([1.0, 0.0, 1.0])
    actual = run(case, kernels)
    assert actual["log_probs"].isnan().tolist() == [True, True, False]
    assert (actual["dlogits"][1] == 0).all() and actual["dlogits"][2].isfinite().all()


def test_rows_without_gradient_are_zero_and_unread(kernels: tuple[str, str]) -> None:
    case = random_case(4, 300, 304)
    case.lists = [[1, 2], [], [5], [7, 8]]
    case.grad = torch.tensor([0.0, 0.0, 0.0, 1.5, -1.5])
    leaf = case.logits.to(kernels[1]).requires_grad_()
    logits = leaf * 1
    rows = case.rows.to(kernels[1])
    out = gathered_log_softmax(logits, rows, vocab_size=300, kernels=kernels[0])
    with torch.no_grad():
        logits.data.fill_(torch.nan)  # whoever reads it in backward now spreads NaN
    out.backward(case.grad.to(kernels[1]))
    dlogits = leaf.grad.cpu()
    assert (dlogits[:3] == 0).all()
    # Gradients that cancel leave the sparse part alone.
    assert dlogits[3, 7] == 1.5 and dlogits[3, 8] == -1.5
    assert dlogits[3].count_nonzero() == 2


def test_each_row_uses_its_own_gradient(kernels: tuple[str, str]) -> None:
    case = random_case(5, 64, 64)
    case.lists = [[i] for i in range(5)]
    case.grad = torch.tensor([1.0, -2.0, 0.0, 30.0, 0.25])
    actual = run(case, kernels)
    check(case, actual)
    # The row's gradient at its id is g · (1 - p): its sign and size are those of g.
    at_id = actual["dlogits"].cpu()[range(5), range(5)]
    assert at_id.sign().tolist() == [1, -1, 0, 1, 1]


def test_repeated_ids_add_up(kernels: tuple[str, str]) -> None:
    case = random_case(2, 40, 40)
    case.lists, case.grad = [[7, 7, 9, 7], [3, 3]], torch.tensor([1.0, 2.0, -1.0, 0.5, 1.0, -1.0])
    check(case, run(case, kernels))


@pytest.mark.parametrize("lists", [[], [[], [], []]], ids=["no rows", "no ids"])
def test_nothing_to_do(kernels: tuple[str, str], lists: list[list[int]]) -> None:
    case = Case(torch.randn(len(lists), 20), lists, 20, torch.empty(0), torch.empty(0), torch.ones(len(lists)))
    actual = run(case, kernels, with_values=True)
    assert actual["log_probs"].shape == (0,)
    assert (actual["dlogits"] == 0).all()
    assert (actual["expectation"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expectation(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    case = random_case(7, 200, 208, dtype)
    check(case, run(case, kernels, with_values=True), with_values=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_overwritten_only_if_asked(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    case = random_case(4, 100, 104, dtype)
    rows, device = case.rows, kernels[1]
    for inplace in (False, True):
        seen = {}
        leaf = case.logits.to(device).requires_grad_()
        logits = leaf * 1
        logits.register_hook(lambda grad, seen=seen: seen.update(grad=grad.data_ptr()))
        address = logits.data_ptr()
        before = logits.detach().clone()
        keep = logits if not inplace else None
        out = gathered_log_softmax(
            logits, rows.to(device), vocab_size=100, kernels=kernels[0], inplace_backward=inplace
        )
        del logits
        out.backward(case.grad.to(device))
        assert (seen["grad"] == address) == inplace
        if keep is not None:
            assert torch.equal(keep.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(kernels: tuple[str, str], dtype: torch.dtype) -> None:
    case = random_case(33, 3000, 3000, dtype, max_ids=9)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, kernels))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in other)


def test_strided_and_transposed_logits(kernels: tuple[str, str]) -> None:
    case = random_case(6, 90, 96)
    expected = reference(case)
    wide = torch.randn(6, 200, device=kernels[1])
    wide[:, 33:129] = case.logits
    for logits in (wide[:, 33:129], case.logits.to(kernels[1]).t().contiguous().t()):
        leaf = logits.detach().requires_grad_()
        out = gathered_log_softmax(leaf, case.rows.to(kernels[1]), vocab_size=90, kernels=kernels[0])
        out.backward(case.grad.to(kernels[1]))
        assert_log_probs_close(out, expected["log_probs"])
        assert_dlogits_close(leaf.grad, expected["dlogits"], row_grad(case))


class _FarApart(torch.autograd.Function):
    """A copy of `x` whose rows are `stride` elements apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        return x.new_empty(stride + x.shape[1]).as_strided(x.shape, (stride, 1)).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clone(memory_format=torch.contiguous_format), None


def test_offsets_past_two_to_the_31(kernels: tuple[str, str]) -> None:
    # Two rows 2^31 + 64 elements apart: the pages between them are never touched.
    case = random_case(2, 500, 500, torch.bfloat16)
    case.lists, case.grad = [[3], [499, 0]], torch.tensor([1.0, -2.0, 0.5])
    stride = 2**31 + 64
    leaf = case.logits.to(kernels[1]).requires_grad_()
    logits = _FarApart.apply(leaf, stride)
    out = gathered_log_softmax(
        logits, case.rows.to(kernels[1]), vocab_size=500, kernels=kernels[0], inplace_backward=True
    )
    del logits
    out.backward(case.grad.to(kernels[1]))
    expected = reference(case)
    assert_log_probs_close(out, expected["log_probs"])
    assert_dlogits_close(leaf.grad, expected["dlogits"], row_grad(case))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(0, 12),
    vocab_size=st.integers(1, 1200),
    padding=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_size(
    kernels: tuple[str, str], num_rows: int, vocab_size: int, padding: int, dtype: torch.dtype, inplace: bool, seed: int
) -> None:
    case = random_case(num_rows, vocab_size, vocab_size + padding, dtype, seed)
    check(case, run(case, kernels, inplace, with_values=True), with_values=True)


def test_gradcheck() -> None:
    case = random_case(4, 11, 13, torch.float64)
    rows, values = case.rows, case.values

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return gathered_log_softmax(logits, rows, vocab_size=11, values=values)

    assert torch.autograd.gradcheck(both, case.logits.requires_grad_())


def test_reference_is_the_definition() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]], dtype=torch.float64)
    out = reference_gathered_log_softmax(logits, GatherRows.from_lists([[0, 1], [1]]))
    assert out.exp().tolist() == pytest.approx([0.25, 0.75, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(2, 3, 4)), r"must be \[rows, local columns\], got \[2, 3, 4\]"),
        (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), "floating point, got torch.int64"),
        (dict(logits=torch.zeros(3, 5)), "logits has 3 rows, GatherRows has 2"),
        (dict(vocab_size=4), r"ids reach from 0 to 4, outside \[0, vocab_size=4\)"),
        (dict(vocab_size=6), "5 local columns on 1 ranks cannot hold a vocabulary of 6"),
        (dict(vocab_size=0), "vocab_size must be positive"),
        (dict(padded_vocab_size=8), "5 local columns on 1 ranks are not the padded vocabulary of 8"),
        (dict(values=torch.zeros(3)), r"values must be \[nnz = 2\]"),
        (dict(values=torch.zeros(2, requires_grad=True)), "values must not require a gradient"),
        (dict(kernels="triton"), "'torch', 'fused' or 'auto', got 'triton'"),
        (dict(logits=torch.zeros(2, 5, requires_grad=True), inplace_backward=True), "leaf tensor"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = dict(logits=torch.zeros(2, 5), rows=GatherRows.from_lists([[0], [4]]), vocab_size=5) | change
    with pytest.raises(ValueError, match=message):
        gathered_log_softmax(arguments.pop("logits"), arguments.pop("rows"), **arguments)
