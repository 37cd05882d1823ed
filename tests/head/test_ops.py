"""The operators as PyTorch sees them: schema, meta tensors, autograd registration, torch.compile."""

import pytest
import torch
from torch import Tensor

from real_megatron.head import gathered_log_softmax, ops
from tests.support.head_cases import Case, random_case


def operator_arguments(case: Case, kernels: str) -> dict[str, tuple]:
    rows = case.rows
    csr = (rows.ids, rows.offsets, rows.row_index)
    shard = (0, case.vocab_size)
    packed = ops.head_stats(case.logits, *csr, case.values, *shard, kernels)
    log_probs, _, maximum, total = ops.head_log_probs(
        case.logits, packed.unsqueeze(0), *csr, case.values, *shard, False, kernels
    )
    kept = (log_probs, maximum, total, case.grad)
    logits = case.logits.clone().requires_grad_()
    return {
        "head_stats": (case.logits, *csr, case.values, *shard, kernels),
        "head_log_probs": (logits, packed.unsqueeze(0), *csr, case.values, *shard, False, kernels),
        "head_dlogits": (case.logits, *kept, *csr, *shard, kernels),
        "head_dlogits_": (case.logits.clone(), *kept, *csr, *shard, kernels),
    }


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("name", ["head_stats", "head_log_probs", "head_dlogits", "head_dlogits_"])
def test_opcheck(name: str, kernels: str) -> None:
    arguments = operator_arguments(random_case(4, 30, 32), kernels)[name]
    torch.library.opcheck(getattr(torch.ops.real_megatron, name).default, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_equals_eager(inplace: bool) -> None:
    case = random_case(5, 60, 64)
    rows, values = case.rows, case.values

    def objective(leaf: Tensor) -> Tensor:
        log_probs, expectation = gathered_log_softmax(
            leaf * 2, rows, vocab_size=60, values=values, inplace_backward=inplace
        )
        return log_probs @ case.grad + expectation @ case.grad_expectation

    gradients = []
    for function in (objective, torch.compile(objective, backend="aot_eager", fullgraph=True)):
        leaf = case.logits.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_meta_tensors_have_the_right_shapes() -> None:
    case = random_case(5, 60, 64, torch.bfloat16)
    rows = case.rows.to("meta")
    logits = torch.empty(5, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out, expectation = gathered_log_softmax(logits, rows, vocab_size=60, values=case.values.to("meta"))
    (out.sum() + expectation.sum()).backward()
    assert out.shape == (rows.nnz,) and out.dtype == torch.float32
    assert expectation.shape == (5,)
    assert logits.grad.shape == logits.shape and logits.grad.dtype == torch.bfloat16
