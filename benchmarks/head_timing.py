"""Times, speeds and peak memory of the contenders of `benchmarks.head`."""

import contextlib
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.head_contenders import Inputs, Shape, contenders
from benchmarks.measure import MIB, fastest, peak_bytes, reset_peak, return_freed_memory, synchronize

HEAD_START_CYCLES = 20_000_000
"""About 10 ms of a GPU's clock."""


class _Source(torch.autograd.Function):
    """Logits as a layer would have made them: not a leaf, referenced by nothing else, without cost in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Tensor) -> Tensor:
        return source.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def forward_backward(call: Callable[[], Tensor], grad: Tensor, device: str) -> tuple[float, float]:
    """Seconds of forward and of backward: on a GPU those that it is busy or waits for its own kernels."""
    if device == "cuda":
        return _on_the_gpu(call, grad)
    synchronize(device)
    start = time.perf_counter()
    out = call()
    synchronize(device)
    middle = time.perf_counter()
    out.backward(grad if out.dim() else None)
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def _on_the_gpu(call: Callable[[], Tensor], grad: Tensor) -> tuple[float, float]:
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    # The GPU idles first, while the host queues the kernels: the launches of a millisecond of work would take as long.
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    out = call()
    middle.record()
    out.backward(grad if out.dim() else None)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3


def run_once(contender: Callable[..., Tensor], x: Inputs, device: str) -> tuple[float, float]:
    """Seconds of a contender's forward and of its backward."""
    for leaf in x.leaves():
        leaf.grad = None
    if x.logits is None:
        return forward_backward(lambda: contender(x), x.grad, device)
    made = [_Source.apply(torch.zeros(1, device=device, requires_grad=True), x.logits)]
    return forward_backward(lambda: contender(made.pop(), x), x.grad, device)


def take_turns(
    chosen: dict[str, Callable[..., Tensor]], x: Inputs, device: str, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each contender's forward and backward; each repeat runs all of them. The first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for repeat in range(repeats + 1):
        for name, contender in chosen.items():
            seconds = run_once(contender, x, device)
            if repeat:
                times[name].append(seconds)
    return times


def peak_memory(shape: Shape, kind: str, name: str, queue: Any = None) -> float:
    """MiB that one forward and backward of a contender need beyond its inputs.

    `kind` is "logits" or "head". On a CPU call it in a fresh process; `queue` takes the result there.
    """
    return_freed_memory()
    with process_group(shape.device) if "Megatron" in name else contextlib.nullcontext():
        contender = contenders(shape.device)[0 if kind == "logits" else 1][name]
        x = shape.inputs(kind == "logits")
        run_once(contender, x, shape.device)  # loads, compiles and tunes what the measured run uses
        for leaf in x.leaves():
            leaf.grad = None
        if x.logits is not None:
            made = [_Source.apply(torch.zeros(1, device=shape.device, requires_grad=True), x.logits)]
            x.logits = None
        before = reset_peak(shape.device)
        forward_backward(lambda: contender(made.pop(), x) if kind == "logits" else contender(x), x.grad, shape.device)
        mib = (peak_bytes(shape.device) - before) / MIB
    if queue is not None:
        queue.put(mib)
    return mib


def peak_of(shape: Shape, kind: str, name: str) -> float:
    """`peak_memory`, on a CPU in a process that runs nothing else."""
    if shape.device == "cuda":
        return peak_memory(shape, kind, name)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(shape, kind, name, queue))
    process.start()
    mib = queue.get(timeout=600)
    process.join()
    return mib


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """A process group of one rank, which Megatron's losses need: NCCL's for a GPU, as in a run of its own."""
    warnings.filterwarnings("ignore", module="megatron")  # about optional packages that are not installed
    from megatron.core import parallel_state

    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def copy_speed(shape: Shape, repeats: int) -> float:
    """Bytes read plus bytes written per second by a copy of a tensor as large as the logits."""
    source = torch.zeros(shape.rows, shape.vocab_size, device=shape.device, dtype=shape.dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), shape.device, repeats)


def gemm_speed(shape: Shape, repeats: int) -> float:
    """FLOP/s of hidden @ weightᵀ."""
    x = shape.inputs(with_logits=False)
    hidden, weight = x.hidden.detach(), x.weight.detach()
    out = torch.empty(shape.rows, shape.vocab_size, device=shape.device, dtype=shape.dtype)
    seconds = fastest(lambda: torch.mm(hidden, weight.t(), out=out), shape.device, repeats)
    return 2 * shape.rows * shape.vocab_size * shape.hidden_size / seconds


def milliseconds(times: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Medians of forward, backward and total, and the fastest total."""
    totals = [f + b for f, b in times]
    medians = (statistics.median(column) * 1e3 for column in (*zip(*times, strict=True), totals))
    return *medians, min(totals) * 1e3
