"""What `benchmarks.head` compares: this package's head, naive torch, and libraries where they are installed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import MIB
from real_megatron.head import GatherRows, gathered_log_softmax, linear_gathered_log_softmax


@dataclass
class Inputs:
    """What a contender gets: one id per row, the gradient of its log-probability, and logits or their two factors."""

    rows: GatherRows
    grad: Tensor
    vocab_size: int
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [t for t in (self.hidden, self.weight) if t is not None]


@dataclass(frozen=True)
class Shape:
    """Sizes, dtype and device of the inputs."""

    rows: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T = {self.rows}, V = {self.vocab_size}, H = {self.hidden_size}, {dtype}"

    def inputs(self, with_logits: bool) -> Inputs:
        """Random inputs, the same at each call: logits, or hidden states and weight."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype)

        ids = torch.randint(0, self.vocab_size, (self.rows,), generator=generator, device=self.device)
        grad = normal(self.rows).float()
        x = Inputs(GatherRows.one_per_row(ids), grad, self.vocab_size)
        if with_logits:
            x.logits = normal(self.rows, self.vocab_size)
        else:
            x.hidden = normal(self.rows, self.hidden_size).requires_grad_()
            x.weight = normal(self.vocab_size, self.hidden_size).mul_(self.hidden_size**-0.5).requires_grad_()
        return x


def naive(logits: Tensor, x: Inputs) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, x.rows.ids.unsqueeze(1)).squeeze(1)


def megatron(logits: Tensor, x: Inputs) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits.unsqueeze(1), x.rows.ids.unsqueeze(1)).squeeze(1)


def megatron_fused(logits: Tensor, x: Inputs) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    target = x.rows.ids.unsqueeze(1)
    return fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), target, dist.group.WORLD).squeeze(1)


def liger(logits: Tensor, x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, x.rows.ids, reduction="none")


def ours(kernels: Literal["torch", "fused"], inplace: bool) -> Callable[[Tensor, Inputs], Tensor]:
    return lambda logits, x: gathered_log_softmax(
        logits, x.rows, vocab_size=x.vocab_size, kernels=kernels, inplace_backward=inplace
    )


def from_hidden(head: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: head(x.hidden @ x.weight.t(), x)


def linear(budget: int = 256 * MIB) -> Callable[[Inputs], Tensor]:
    return lambda x: linear_gathered_log_softmax(
        x.hidden, x.weight, x.rows, vocab_size=x.vocab_size, memory_budget_bytes=budget
    )


def linear_by_rows(budget: int) -> Callable[[Inputs], Tensor]:
    """The alternative: chunks of rows over the whole vocabulary, each adding to the whole weight gradient."""

    def run(x: Inputs) -> Tensor:
        height = max(1, budget // (x.vocab_size * x.hidden.element_size()))
        spans = [(r, min(r + height, len(x.hidden))) for r in range(0, len(x.hidden), height)]
        chunks = [
            linear_gathered_log_softmax(
                x.hidden[a:b], x.weight, x.rows.slice(a, b), vocab_size=x.vocab_size, memory_budget_bytes=2**40
            )
            for a, b in spans
        ]
        return torch.cat(chunks)

    return run


def torch_linear_cross_entropy(x: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(x.hidden, x.weight, x.rows.ids, reduction="sum", options=options)


def liger_linear(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x.hidden, x.weight, x.rows.ids, reduction="sum")


def cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.rows.ids, reduction="none")


def contenders(
    device: str,
) -> tuple[dict[str, Callable[[Tensor, Inputs], Tensor]], dict[str, Callable[[Inputs], Tensor]]]:
    """Those over logits, and those from hidden states, that can run here."""
    over_logits: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
        "naive torch (log_softmax + gather)": naive,
        "ours, plain torch": ours("torch", False),
        "ours, fused": ours("fused", False),
        "ours, fused, in place": ours("fused", True),
    }
    heads = {
        "naive torch (log_softmax + gather)": from_hidden(naive),
        "ours, logits form": from_hidden(ours("fused", True)),
        "ours, linear form": linear(),
    }
    if importlib.util.find_spec("megatron"):
        over_logits["Megatron vocab_parallel_cross_entropy"] = megatron
        over_logits["Megatron fused_vocab_parallel_cross_entropy"] = megatron_fused
        heads["Megatron vocab_parallel_cross_entropy"] = from_hidden(megatron)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        heads["torch linear_cross_entropy, chunked (one scalar)"] = torch_linear_cross_entropy
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        over_logits["Liger cross_entropy"] = liger
        heads["Liger fused_linear_cross_entropy (one scalar)"] = liger_linear
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        heads["Apple cut-cross-entropy"] = cut_cross_entropy
    return over_logits, heads


def selected(available: dict[str, Callable[..., Tensor]], only: str) -> dict[str, Callable[..., Tensor]]:
    """The contenders whose name contains `only`, and the naive one, with which they are compared."""
    return {name: call for name, call in available.items() if only in name or name.startswith("naive")}
