"""The linear form against float64 autograd through the whole logits: dtypes, budgets, layouts, Megatron's main_grad."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from real_megatron.head import GatherRows, gathered_log_softmax, linear_gathered_log_softmax
from real_megatron.head import linear as linear_module
from real_megatron.objective.rewards import REWARDS, RewardOptions
from tests.support import head_ranks
from tests.support.head_cases import random_case
from tests.support.ranks import run_ranks

ROWS, HIDDEN, VOCAB, PADDED = 12, 24, 300, 320
# On a GPU the GEMMs take other branches and the kernels are the CUDA ones.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Logits of a few rows by 128 columns: several chunks of rows and three of the vocabulary. Half precision needs room for
# the float32 copy of a chunk's weights as well.
TINY_BUDGET = {torch.float64: 8 << 10, torch.float32: 4 << 10, torch.bfloat16: 16 << 10, torch.float16: 16 << 10}


class Problem:
    """Hidden states, a padded weight, ids and a gradient; the float64 answer on the same rounded numbers."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = (scale * torch.randn(ROWS, HIDDEN, generator=generator)).to(dtype)
        self.weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
        self.case = random_case(ROWS, VOCAB, PADDED, dtype, seed)
        self.lists, self.grad = self.case.lists, self.case.grad

    @property
    def rows(self) -> GatherRows:
        return GatherRows.from_lists(self.lists)

    def expected(self, row_scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        logits = row_scale * (hidden @ weight.t())
        log_probs = gathered_log_softmax(logits, self.rows, vocab_size=VOCAB, kernels="torch")
        log_probs.backward(self.grad.double())
        return {"log_probs": log_probs.detach(), "dhidden": hidden.grad, "dweight": weight.grad}

    def run(self, device: str = "cpu", **options: object) -> dict[str, Tensor]:
        hidden = self.hidden.to(device, copy=True).requires_grad_()
        weight = self.weight.to(device, copy=True).requires_grad_()
        out = linear_gathered_log_softmax(hidden, weight, self.rows.to(device), vocab_size=VOCAB, **options)
        out.backward(self.grad.to(device))
        return {"log_probs": out.detach().cpu(), "dhidden": hidden.grad.cpu(), "dweight": weight.grad.cpu()}


def check(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, fp32_logits: bool = False
) -> None:
    """Bounds from the dtype's eps, relative to the largest number of each result.

    float64, float32: a few eps for GEMMs of 24 and 300 terms. bfloat16: logits are rounded to 2^-9 relative, so they
    are off by up to |z| · 2^-9 (|z| ≤ 30 here), which moves log-probabilities by as much and gradients by that factor;
    with float32 logits only dlogits and the results are rounded.
    """
    eps = torch.finfo(dtype).eps
    if dtype in (torch.float64, torch.float32):
        bounds = dict(log_probs=16 * eps, dhidden=32 * eps, dweight=32 * eps)
    elif fp32_logits:
        bounds = dict(log_probs=32 * torch.finfo(torch.float32).eps, dhidden=2 * eps, dweight=2 * eps)
    else:
        bounds = dict(log_probs=eps, dhidden=6 * eps, dweight=6 * eps)
    for key, value in actual.items():
        scale = expected[key].abs().max()
        error = (value.double() - expected[key]).abs().max() / scale
        assert error <= bounds[key], f"{key}: {error:.3g} > {bounds[key]:.3g}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("budget", [TINY_BUDGET, dict.fromkeys(TINY_BUDGET, 256 << 20)], ids=["tiny", "roomy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(dtype: torch.dtype, budget: dict[torch.dtype, int], kernels: str, device: str) -> None:
    problem = Problem(dtype)
    actual = problem.run(device, memory_budget_bytes=budget[dtype], kernels=kernels)
    check(actual, problem.expected(), dtype)
    assert (actual["dweight"][VOCAB:] == 0).all()
    assert actual["dhidden"].dtype == actual["dweight"].dtype == dtype


def test_float64_and_gradcheck() -> None:
    problem = Problem(torch.float64)
    check(problem.run(memory_budget_bytes=TINY_BUDGET[torch.float64]), problem.expected(), torch.float64)
    inputs = (problem.hidden[:3, :4].clone().requires_grad_(), problem.weight[:9, :4].clone().requires_grad_())
    rows = GatherRows.from_lists([[6, 6, 1], [], [0]])
    assert torch.autograd.gradcheck(lambda h, w: linear_gathered_log_softmax(h, w, rows, vocab_size=7), inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_float32_logits_from_bfloat16_inputs(kernels: str, device: str) -> None:
    problem = Problem(torch.bfloat16, scale=4.0)
    expected = problem.expected()
    check(
        problem.run(device, fp32_logits=True, memory_budget_bytes=TINY_BUDGET[torch.bfloat16], kernels=kernels),
        expected,
        torch.bfloat16,
        True,
    )
    # The option matters: rounding logits of size ~50 to bfloat16 is at least a hundred times coarser.
    coarse = problem.run(device, kernels=kernels)["log_probs"].double()
    fine = problem.run(device, fp32_logits=True, kernels=kernels)["log_probs"].double()
    assert (coarse - expected["log_probs"]).abs().max() > 100 * (fine - expected["log_probs"]).abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_rows(dtype: torch.dtype, kernels: str, device: str) -> None:
    """Temperature rows: no rounding to bfloat16 comes between the product and the scaled logits."""
    problem = Problem(dtype, scale=4.0)
    row_scale = torch.tensor([1 / 0.7] * 7 + [1.0] * 5, device=device)
    options = dict(fp32_logits=True, memory_budget_bytes=TINY_BUDGET[dtype], kernels=kernels)
    actual = problem.run(device, row_scale=row_scale, **options)
    # float32 factors
    check(actual, problem.expected(row_scale.cpu().double().unsqueeze(1)), dtype, True)


def test_the_reward_of_a_confident_judge_needs_float32_logits() -> None:
    """A judge between two scores at logits near 24, where a bfloat16 step is 0.125: the reward's error against float64
    on the same bfloat16 inputs. Rounding moves each logit by up to 0.0625; float32 by about 24 · 2⁻²⁴ a term."""
    generator = torch.Generator().manual_seed(0)
    count, hidden_size, vocab, scores = 400, 64, 512, torch.arange(5)
    direction = torch.nn.functional.normalize(torch.randn(hidden_size, generator=generator), dim=0)
    weight = 0.1 * torch.randn(vocab, hidden_size, generator=generator)
    weight[:5] += direction
    hidden = 24 * direction + torch.randn(count, hidden_size, generator=generator)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    values = torch.arange(1.0, 6.0)
    labels = values[torch.randint(5, (count,), generator=generator)]

    def rewards(log_probs: Tensor) -> Tensor:
        return REWARDS["real"].function(log_probs.view(count, 5), values, labels, RewardOptions()).double()

    rows = GatherRows.from_lists([scores.tolist()] * count)
    exact = hidden.double() @ weight.double().t()
    assert 20 < exact[:, :5].mean() < 28
    want = rewards(exact.log_softmax(-1)[:, :5])
    noise = [
        (rewards(linear_gathered_log_softmax(hidden, weight, rows, vocab_size=vocab, fp32_logits=fp32)) - want).std()
        for fp32 in (False, True)
    ]
    assert noise[0] > 0.02 and noise[1] < 1e-4, noise


@pytest.mark.parametrize("device", DEVICES)
def test_the_hidden_gradient_of_many_chunks_is_summed_in_float32(device: str) -> None:
    # 64 chunks of 128 columns: in bfloat16 each addition would round the sum.
    problem = Problem(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64 * 128, HIDDEN, generator=generator).bfloat16().to(device)
    hidden = problem.hidden.to(device, copy=True).requires_grad_()
    rows = GatherRows.one_per_row(torch.arange(ROWS)).to(device)
    budget = TINY_BUDGET[torch.bfloat16]
    linear_gathered_log_softmax(
        hidden, weight, rows, vocab_size=len(weight), memory_budget_bytes=budget, fp32_logits=True
    ).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().t()
    gathered_log_softmax(logits, rows, vocab_size=len(weight), kernels="torch").sum().backward()
    error = (hidden.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["none", "all_reduce", "reduce_scatter"])
def test_over_ranks(ranks: int, reduction: str) -> None:
    problem = Problem(torch.float32)
    expected = problem.expected()
    options = dict(reduce_dhidden=reduction, memory_budget_bytes=TINY_BUDGET[torch.float32])
    arguments = (problem.hidden, problem.weight, problem.lists, problem.grad, VOCAB)
    for main_grad in (False, True):
        results = run_ranks(ranks, head_ranks.linear_case, *arguments, main_grad, options)
        assert all(torch.equal(r["log_probs"], results[0]["log_probs"]) for r in results)
        shards = [r["dhidden"] for r in results]
        if reduction == "none":
            dhidden = sum(shards)
        elif reduction == "all_reduce":
            dhidden = shards[0]
            assert all(torch.equal(shard, dhidden) for shard in shards)
        else:
            assert all(len(shard) == ROWS // ranks for shard in shards)
            dhidden = torch.cat(shards)
        dweight = torch.cat([r["dweight"] for r in results])
        check(dict(log_probs=results[0]["log_probs"], dhidden=dhidden, dweight=dweight), expected, torch.float32)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bfloat16_over_ranks(ranks: int) -> None:
    # As trained: sequence parallelism, bfloat16 GEMMs, float32 main_grad, small chunks on each rank.
    problem = Problem(torch.bfloat16)
    options = dict(reduce_dhidden="reduce_scatter", memory_budget_bytes=TINY_BUDGET[torch.bfloat16])
    arguments = (problem.hidden, problem.weight, problem.lists, problem.grad, VOCAB, True, options)
    results = run_ranks(ranks, head_ranks.linear_case, *arguments)
    assert all(torch.equal(r["log_probs"], results[0]["log_probs"]) for r in results)
    whole = {key: torch.cat([r[key] for r in results]) for key in ("dhidden", "dweight")}
    assert whole["dhidden"].dtype == torch.bfloat16 and whole["dweight"].dtype == torch.float32
    assert (whole["dweight"][VOCAB:] == 0).all()
    check(whole | dict(log_probs=results[0]["log_probs"]), problem.expected(), torch.bfloat16)


@pytest.mark.parametrize("reduction", ["none", "all_reduce", "reduce_scatter"])
def test_no_rows_over_ranks(reduction: str) -> None:
    problem = Problem(torch.float32)
    arguments = (problem.hidden[:0], problem.weight, [], torch.empty(0), VOCAB, False, dict(reduce_dhidden=reduction))
    for result in run_ranks(2, head_ranks.linear_case, *arguments):
        assert result["log_probs"].shape == (0,) and result["dhidden"].shape == (0, HIDDEN)
        assert not result["dweight"].any()


def test_the_reduction_starts_before_the_last_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    # dhidden is complete after the last chunk's first GEMM; its reduction then runs beside the last one.
    calls = []
    add_mm = linear_module.add_mm
    start = linear_module._Reduction.start

    def recorded_add(out: Tensor, a: Tensor, b: Tensor) -> None:
        calls.append("dhidden" if out.shape[0] <= ROWS else "dweight")
        add_mm(out, a, b)

    def recorded_start(self: linear_module._Reduction, dhidden: Tensor) -> Tensor:
        calls.append("reduce")
        return start(self, dhidden)

    monkeypatch.setattr(linear_module, "add_mm", recorded_add)
    monkeypatch.setattr(linear_module._Reduction, "start", recorded_start)
    Problem(torch.float32).run(memory_budget_bytes=TINY_BUDGET[torch.float32])
    assert calls[-3:] == ["dhidden", "reduce", "dweight"]
    assert calls.count("reduce") == 1 and calls.count("dweight") > 3


def test_a_rank_of_padding_takes_part() -> None:
    # Padded to four shards of 128: ids 300 … 511 do not exist, so the last rank has no column at all.
    problem = Problem(torch.float32)
    problem.weight = torch.cat([problem.weight, torch.full((512 - PADDED, HIDDEN), 9.0)])
    for reduction in ("all_reduce", "reduce_scatter"):
        arguments = (problem.hidden, problem.weight, problem.lists, problem.grad, VOCAB, False)
        results = run_ranks(4, head_ranks.linear_case, *arguments, dict(reduce_dhidden=reduction))
        dhidden = results[3]["dhidden"] if reduction == "all_reduce" else torch.cat([r["dhidden"] for r in results])
        dweight = torch.cat([r["dweight"] for r in results])
        check(
            dict(log_probs=results[3]["log_probs"], dhidden=dhidden, dweight=dweight), problem.expected(), torch.float32
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_is_added_to_main_grad(dtype: torch.dtype, device: str) -> None:
    problem = Problem(dtype)
    weight = torch.nn.Parameter(problem.weight.to(device))
    weight.main_grad = torch.full(weight.shape, 2.0, device=device)
    weight.grad_added_to_main_grad = False
    hidden, rows = problem.hidden.to(device), problem.rows.to(device)
    for _ in range(2):  # two micro-batches
        linear_gathered_log_softmax(
            hidden, weight, rows, vocab_size=VOCAB, memory_budget_bytes=TINY_BUDGET[dtype]
        ).backward(problem.grad.to(device))
    assert weight.grad_added_to_main_grad
    bound = 32 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 12 * torch.finfo(dtype).eps
    expected = 2 + 2 * problem.expected()["dweight"]
    assert (weight.main_grad.cpu() - expected).abs().max() <= bound * expected.abs().max()


def test_tied_embeddings() -> None:
    # One weight embeds and projects. As Megatron's DDP does it: what autograd left in .grad is then added to main_grad,
    # so the head must leave nothing but zeros there (zero_out_wgrad) next to the embedding's gradient.
    problem = Problem(torch.float32)
    tokens = torch.arange(ROWS) * 3
    tied = problem.weight.clone().requires_grad_()
    gathered_log_softmax(
        torch.nn.functional.embedding(tokens, tied) @ tied.t(), problem.rows, vocab_size=VOCAB, kernels="torch"
    ).backward(problem.grad)

    weight = torch.nn.Parameter(problem.weight.clone())
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    hidden = torch.nn.functional.embedding(tokens, weight)
    linear_gathered_log_softmax(hidden, weight, problem.rows, vocab_size=VOCAB).backward(problem.grad)
    total = weight.main_grad + weight.grad
    torch.testing.assert_close(total, tied.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    problem = Problem(torch.float32)
    hidden, weight = (
        problem.hidden.requires_grad_(frozen != "hidden"),
        problem.weight.requires_grad_(frozen != "weight"),
    )
    weight.main_grad = torch.zeros(PADDED, HIDDEN)
    linear_gathered_log_softmax(hidden, weight, problem.rows, vocab_size=VOCAB).backward(problem.grad)
    if frozen == "hidden":
        assert hidden.grad is None and weight.main_grad.any()
    else:
        assert hidden.grad is not None and not weight.main_grad.any()


@pytest.mark.parametrize("lists", [[], [[], []]], ids=["no rows", "no ids"])
def test_nothing_to_do(lists: list[list[int]]) -> None:
    hidden, weight = torch.randn(len(lists), 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    out = linear_gathered_log_softmax(hidden, weight, GatherRows.from_lists(lists), vocab_size=10)
    out.backward(torch.empty(0))
    assert out.shape == (0,) and not hidden.grad.any() and not weight.grad.any()


def test_bitwise_repeatable_and_equal_in_inference() -> None:
    problem, budget = Problem(torch.bfloat16), TINY_BUDGET[torch.bfloat16]
    first, second = (problem.run(memory_budget_bytes=budget) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        out = linear_gathered_log_softmax(
            problem.hidden, problem.weight, problem.rows, vocab_size=VOCAB, memory_budget_bytes=budget
        )
    assert torch.equal(out, first["log_probs"])


class _LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_never_exist(dtype: torch.dtype) -> None:
    # 64 rows x 4096 columns would be 1 MiB of float32 logits; the budget is an eighth, the weight smaller still.
    rows = GatherRows.one_per_row(torch.arange(64))
    hidden = torch.randn(64, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(4096, 4, dtype=dtype, requires_grad=True)
    with _LargestTensor() as largest:
        out = linear_gathered_log_softmax(
            hidden, weight, rows, vocab_size=4096, memory_budget_bytes=128 << 10, kernels="fused"
        )
        # Called directly: autograd's backward would leave this thread's dispatch mode.
        linear_module._LinearGathered.backward(out.grad_fn, torch.ones_like(out))
    assert 0 < largest.bytes <= 128 << 10


def test_statistics_stay_small_however_many_chunks() -> None:
    # 1,024 rows in chunks of 128 of 32,768 columns: the statistics of all 256 chunks would be 3 MiB.
    rows = GatherRows.one_per_row(torch.arange(1024))
    hidden, weight = torch.randn(1024, 2), torch.randn(32_768, 2)
    with _LargestTensor() as largest:
        linear_gathered_log_softmax(hidden, weight, rows, vocab_size=32_768, memory_budget_bytes=512 << 10)
    assert 0 < largest.bytes <= 512 << 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.zeros(2, 3)), r"need hidden \[R, H\] and weight \[V_local, H\], got \[2, 3\] and \[5, 4\]"),
        (dict(row_scale=torch.ones(3)), r"row_scale must be \[R = 2\], got \[3\]"),
        (dict(hidden=torch.zeros(2, 4).bfloat16()), "hidden is torch.bfloat16 on cpu, weight torch.float32"),
        (dict(hidden=torch.zeros(3, 4)), "hidden has 3 rows, GatherRows has 2"),
        (dict(vocab_size=6), "cannot hold a vocabulary of 6"),
        (dict(memory_budget_bytes=8), "memory_budget_bytes=8 cannot hold one row of a chunk: give it at least 20"),
        (dict(reduce_dhidden="sum"), "reduce_dhidden must be"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(5, 4), rows=GatherRows.from_lists([[0], [4]]))
    arguments |= dict(vocab_size=5) | change
    with pytest.raises(ValueError, match=message):
        linear_gathered_log_softmax(**arguments)
