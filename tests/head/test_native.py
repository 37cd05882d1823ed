"""The compiled kernels: what they refuse, what happens without a compiler, rounding, and order of CUDA threads."""

import contextlib
import ctypes
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from real_megatron.head import GatherRows, build, gathered_log_softmax, native, torch_kernels
from real_megatron.head.shard import VocabularyShard
from tests.support.head_cases import random_case

ROWS = GatherRows.from_lists([[1], [2, 0]])


@pytest.fixture
def fresh_search() -> Iterator[None]:
    """Forget which compilers and libraries were found, before and after."""

    def forget() -> None:
        for function in (native.library, native._refused_by_gpu, build.cxx, build.nvcc):
            function.cache_clear()

    forget()
    yield
    forget()


def test_without_a_compiler_the_torch_kernels_are_used_and_one_warning_says_so(
    fresh_search: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logits = torch.randn(2, 4)
    with caplog.at_level(logging.WARNING):
        results = [
            gathered_log_softmax(logits, ROWS, vocab_size=4, kernels=kernels) for kernels in ("auto", "auto", "torch")
        ]
    assert torch.equal(results[0], results[2])
    said = [record.message for record in caplog.records]
    reason = "no C++ compiler (c++, g++ or clang++) on the PATH"
    assert said == [f"head: no compiled cpu kernels ({reason}); the slower PyTorch kernels are used"]
    with pytest.raises(RuntimeError, match="kernels='fused' is not available here: no C\\+\\+ compiler"):
        gathered_log_softmax(logits, ROWS, vocab_size=4, kernels="fused")


def test_a_cache_that_cannot_be_written_does_not_stop_it(
    fresh_search: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file where a folder should go")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(native.library("cpu"), native.Library)


def test_a_gpu_that_cannot_run_the_library_uses_torch(
    fresh_search: None, emulated_cuda: native.Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda kind: emulated_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    device = torch.device("cuda", 3)
    assert native.unsupported(device, torch.bfloat16) is None  # the emulation says that it runs
    native._refused_by_gpu.cache_clear()
    monkeypatch.setattr(emulated_cuda, "check", lambda: 209)
    with caplog.at_level(logging.WARNING):
        reasons = [native.unsupported(device, torch.bfloat16) for _ in range(2)]
    assert reasons == ["GPU 3: emulated error"] * 2
    reason = "head: no compiled cuda kernels (GPU 3: emulated error); the slower PyTorch kernels are used"
    assert [record.message for record in caplog.records] == [reason]


def test_float64_and_other_devices_use_torch() -> None:
    assert "float64" in native.unsupported(torch.device("cpu"), torch.float64)
    assert "not on meta" in native.unsupported(torch.device("meta"), torch.float32)
    with pytest.raises(RuntimeError, match="kernels='torch' does"):
        gathered_log_softmax(torch.randn(2, 4).double(), ROWS, vocab_size=4, kernels="fused")


def test_auto_is_compiled_where_possible() -> None:
    case = random_case(5, 3000, 3000)
    auto, fused = (
        gathered_log_softmax(case.logits, case.rows, vocab_size=3000, kernels=kernels) for kernels in ("auto", "fused")
    )
    assert torch.equal(auto, fused)


def dense_gradient(logits: Tensor, scale: float) -> Tensor:
    """What `native.dlogits` writes for one row of `logits` that asks for no id here and has Σ g = -scale · Σ exp."""
    out = torch.empty_like(logits)
    ids, offsets = torch.tensor([10**6]), torch.tensor([0, 1])
    log_prob, maximum, total, grad = torch.zeros(1), torch.zeros(1), torch.ones(1), torch.full((1,), -scale)
    csr = (ids, offsets, torch.zeros_like(ids))
    native.dlogits(logits, out, log_prob, maximum, total, grad, *csr, VocabularyShard(0, logits.shape[1]))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_round_to_nearest_even_like_torch(dtype: torch.dtype) -> None:
    # exp(0) · scale = scale for a sweep over float32 numbers: ties, subnormals, overflow, both signs.
    mantissas = torch.arange(0, 2**13, dtype=torch.int32) * 2**10
    for exponent in (-30.0, -25.0, -24.0, -15.0, -14.0, -1.0, 0.0, 15.0, 16.0):
        scales = ((mantissas + 0x3F800000).view(torch.float32) * 2.0**exponent)[::37]
        for sign in (1.0, -1.0):
            got = torch.stack([dense_gradient(torch.zeros(1, 1, dtype=dtype), float(sign * s))[0, 0] for s in scales])
            assert torch.equal(got, (sign * scales).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_read_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[~numbers.isnan()]
    # Each is the only logit of its row, so its maximum and the logit that was asked for are the number itself.
    rows = GatherRows.one_per_row(torch.zeros(len(numbers), dtype=torch.int64))
    packed = native.stats(numbers.unsqueeze(1), rows.ids, rows.offsets, rows.row_index, None, VocabularyShard(0, 1))
    assert torch.equal(packed[: len(numbers)], numbers.float())
    assert torch.equal(packed[2 * len(numbers) :], numbers.float())


def test_exponentials_are_accurate_over_their_whole_range() -> None:
    # One row per exponent x: dlogits = exp(x - 0) · 1. 2 ulp of relative error plus the rounding of x · log2(e).
    x = -torch.linspace(0, 87, 4001).unsqueeze(0)
    got = dense_gradient(x, 1.0).double()
    exact = x.double().exp()
    assert ((got - exact).abs() / exact <= 2**-23 * (2 + x.double().abs())).all()
    assert (dense_gradient(torch.tensor([[-88.0, -1000.0, -math.inf]]), 1.0) == 0).all()


def test_nan_and_infinity_end_as_nan() -> None:
    for bad in (math.nan, math.inf):
        logits = torch.randn(2, 300)
        logits[0, 17] = bad
        for kernels in ("torch", "fused"):
            out = gathered_log_softmax(logits, ROWS, vocab_size=300, kernels=kernels)
            assert out.isnan().tolist() == [True, False, False]


def test_every_nan_stays_one() -> None:
    # Among them those whose low bits would reach the sign and exponent if the bits were merely shifted.
    bits = torch.tensor([0x7F800001, 0x7FC00001, 0x7FC001FF, 0x7FFFFFFF, -0x3FFFFF], dtype=torch.int64)
    for nan in bits.to(torch.int32).view(torch.float32):
        logits = torch.zeros(1, 300)
        logits[0, 17] = nan
        assert gathered_log_softmax(logits, GatherRows.from_lists([[3]]), vocab_size=300, kernels="fused").isnan().all()
        assert dense_gradient(logits, 1.0)[0, 17].isnan()


@pytest.mark.parametrize("columns", [20_011, 16_384 + 3], ids=["two tiles", "a tile and a tail"])
def test_cuda_results_do_not_depend_on_the_order_of_threads(emulated_cuda: native.Library, columns: int) -> None:
    # Blocks, and threads to each barrier, run one by one, forwards, then backwards: a missing barrier, or two blocks
    # that write the same column, would change the result.
    reverse = emulated_cuda.library.cuda_on_cpu_backwards
    case = random_case(3, columns, 16 * (columns // 16 + 1), torch.bfloat16, max_ids=40)
    case.lists = [[*ids, columns - 1, columns - 3] for ids in case.lists]
    case.grad = torch.linspace(-1, 2, sum(map(len, case.lists)))
    rows, shard = case.rows, VocabularyShard(0, case.vocab_size)
    kept = torch_kernels.stats(case.logits, rows.ids, rows.offsets, rows.row_index, None, shard)
    maximum, total, logits = kept.split([3, 3, rows.nnz])
    log_probs = logits - maximum[rows.row_index] - total.log()[rows.row_index]
    results = []
    for backwards in (0, 1):
        reverse(ctypes.c_int(backwards))
        packed = torch.full((6 + rows.nnz,), torch.nan)
        scratch = torch.full((emulated_cuda.scratch(1, 3, case.vocab_size),), torch.nan)
        out = case.logits.clone()
        sizes = (1, 3, case.logits.stride(0), *shard)
        csr = (rows.ids.data_ptr(), rows.offsets.data_ptr())
        emulated_cuda.stats(out.data_ptr(), *sizes, *csr, None, False, packed.data_ptr(), scratch.data_ptr(), None)
        sizes = (1, 3, out.shape[1], out.stride(0), out.stride(0), *shard)
        saved = [t.contiguous().data_ptr() for t in (log_probs, maximum, total, case.grad)]
        emulated_cuda.dlogits(out.data_ptr(), out.data_ptr(), *sizes, *saved, *csr, scratch.data_ptr(), None)
        results.append((packed, out))
    reverse(ctypes.c_int(0))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
