"""The head beside what peers use, in one run: time, bytes/s beside a copy, FLOP/s beside a GEMM, peak memory.

    python tools/benchmark_head.py [--device cuda] [--shape T,V,H …] [--tp 4] [--dtype bfloat16] [--output FILE]
    python tools/benchmark_head.py --device cuda --shape 8192,151936,4096 --dtype bfloat16 --output …/head_h200.md
    python tools/benchmark_head.py --tables logits head --dtype float32 --repeats 3 --output FILE

The last one takes minutes on two idle cores. A report begins with what the head has to show on a CPU: the C++ twin's
speed and the linear form's memory, each beside its bar. Each shape gives three tables: kernels over logits that exist;
the whole head from hidden states; chunk sizes of the linear form. Contenders take turns, and the median and the fastest
of their repeats are shown. Peak memory is what forward and backward need beyond their inputs, gradients included: on a
GPU from its allocator, on a CPU the high-water mark of the resident set of a process that runs nothing else.
Megatron-Core, Liger-Kernel and cut-cross-entropy are measured where they are installed and run on the device. Every row
asks for one id: cross-entropies know no more.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_megatron.head import GatherRows, gathered_log_softmax, linear_gathered_log_softmax
from real_megatron.head import linear as linear_form

MIB = 1 << 20


@dataclass
class Inputs:
    """What a contender gets: one id a row, the gradient of its log-probability, and logits or their factors."""

    rows: GatherRows
    grad: Tensor
    vocab_size: int
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t is not None]


class _Source(torch.autograd.Function):
    """Logits that a layer might have made: not a leaf, held by nobody, and costing nothing in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Tensor) -> Tensor:
        return source.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


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


def ours(form: str, inplace: bool) -> Callable[[Tensor, Inputs], Tensor]:
    return lambda logits, x: gathered_log_softmax(
        logits, x.rows, vocab_size=x.vocab_size, form=form, inplace_backward=inplace
    )


def from_hidden(head: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: head(x.hidden @ x.weight.t(), x)


def linear(budget: int = 256 * MIB) -> Callable[[Inputs], Tensor]:
    return lambda x: linear_gathered_log_softmax(
        x.hidden, x.weight, x.rows, vocab_size=x.vocab_size, memory_budget_bytes=budget
    )


def linear_by_rows(budget: int) -> Callable[[Inputs], Tensor]:
    """The other way to cut: blocks of rows over the whole vocabulary, each adding to the whole weight gradient."""

    def run(x: Inputs) -> Tensor:
        height = max(1, budget // (x.vocab_size * x.hidden.element_size()))
        spans = [(r, min(r + height, len(x.hidden))) for r in range(0, len(x.hidden), height)]
        parts = [
            linear_gathered_log_softmax(
                x.hidden[a:b], x.weight, x.rows.slice(a, b), vocab_size=x.vocab_size, memory_budget_bytes=2**40
            )
            for a, b in spans
        ]
        return torch.cat(parts)

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
        "ours, torch form": ours("torch", False),
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


@dataclass(frozen=True)
class Shape:
    rows: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T = {self.rows}, V = {self.vocab_size}, H = {self.hidden_size}, {dtype}"

    def inputs(self, with_logits: bool) -> Inputs:
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


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forward_backward(call: Callable[[], Tensor], grad: Tensor, device: str) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    synchronize(device)
    start = time.perf_counter()
    out = call()
    synchronize(device)
    middle = time.perf_counter()
    out.backward(grad if out.dim() else None)
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def run_once(contender: Callable[..., Tensor], x: Inputs, device: str) -> tuple[float, float]:
    for leaf in x.leaves():
        leaf.grad = None
    if x.logits is None:
        return forward_backward(lambda: contender(x), x.grad, device)
    made = [_Source.apply(torch.zeros(1, device=device, requires_grad=True), x.logits)]
    return forward_backward(lambda: contender(made.pop(), x), x.grad, device)


def take_turns(
    forms: dict[str, Callable[..., Tensor]], x: Inputs, device: str, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of each form, one repeat of every form after the other; the first round warms up and is dropped."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            seconds = run_once(form, x, device)
            if repeat:
                times[name].append(seconds)
    return times


def peak_memory(shape: Shape, kind: str, name: str, queue: Any = None) -> float:
    """MiB that one forward and backward of a form need beyond its inputs; call in a fresh process on a CPU."""
    _return_freed_memory()
    with process_group() if "Megatron" in name else contextlib.nullcontext():
        form = contenders(shape.device)[0 if kind == "logits" else 1][name]
        x = shape.inputs(kind == "logits")
        run_once(form, x, shape.device)  # loads, compiles and tunes what the measured run uses
        for leaf in x.leaves():
            leaf.grad = None
        if x.logits is not None:
            made = [_Source.apply(torch.zeros(1, device=shape.device, requires_grad=True), x.logits)]
            x.logits = None
        if shape.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
        forward_backward(lambda: form(made.pop(), x) if kind == "logits" else form(x), x.grad, shape.device)
        after = torch.cuda.max_memory_allocated() if shape.device == "cuda" else _resident("VmHWM")
    mib = (after - before) / MIB
    if queue is not None:
        queue.put(mib)
    return mib


def _return_freed_memory() -> None:
    """Make glibc give every freed block of a MiB or more back at once: the resident set then shows what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, MIB)  # M_MMAP_THRESHOLD


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_of(shape: Shape, kind: str, name: str) -> float:
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
def process_group() -> Any:
    """A world of one rank, which Megatron's losses ask for."""
    warnings.filterwarnings("ignore", module="megatron")  # of what is not installed; not what is measured
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def fastest(call: Callable[[], object], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


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


def row(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def header(cells: list[str]) -> list[str]:
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]


def milliseconds(times: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Medians of forward, backward and total, and the fastest total."""
    totals = [f + b for f, b in times]
    medians = (statistics.median(column) * 1e3 for column in (*zip(*times, strict=True), totals))
    return *medians, min(totals) * 1e3


def selected(forms: dict[str, Callable[..., Tensor]], only: str) -> dict[str, Callable[..., Tensor]]:
    """The forms whose name contains `only`, and the naive one, with which they are compared."""
    return {name: form for name, form in forms.items() if only in name or name.startswith("naive")}


@dataclass(frozen=True)
class Bar:
    """Something that the head has to show: `measured` at least (or at most) `bound`."""

    what: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "met" if self.met else "NOT MET"
        return f"- {self.what}: {self.measured:.3g}×, bar {sign} {self.bound:g}×: **{verdict}**"


def logits_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    forms = selected(contenders(shape.device)[0], only)
    with process_group() if any("Megatron" in name for name in forms) else contextlib.nullcontext():
        times = take_turns(forms, shape.inputs(with_logits=True), shape.device, repeats)
    copy = copy_speed(shape, repeats)
    ideal_bytes = 3 * shape.rows * shape.vocab_size * shape.dtype.itemsize
    lines = [
        "Over existing logits. GB/s counts the bytes that a perfect form moves (one read; one read and one write); "
        f"a copy moves {copy / 1e9:.1f} GB/s here.",
        "",
        *header(
            ["form", "forward ms", "backward ms", "both ms", "fastest ms", "speed-up", "GB/s", "of copy", "peak MiB"]
        ),
    ]
    reference = milliseconds(next(iter(times.values())))[2]
    for name, measured in times.items():
        forward, backward, total, best = milliseconds(measured)
        speed = ideal_bytes / (total / 1e3)
        cells = [f"{forward:.1f}", f"{backward:.1f}", f"{total:.1f}", f"{best:.1f}", f"{reference / total:.2f}×"]
        peak = peak_of(shape, "logits", name)
        lines.append(row([name, *cells, f"{speed / 1e9:.1f}", f"{speed / copy:.0%}", f"{peak:.0f}"]))
        if name == "ours, fused" and shape.device == "cpu":
            bars.append(
                Bar(f"C++ twin's speed, forward + backward, over naive torch's ({shape})", reference / total, 2, True)
            )
    return lines


def head_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    forms = selected(contenders(shape.device)[1], only)
    with process_group() if any("Megatron" in name for name in forms) else contextlib.nullcontext():
        times = take_turns(forms, shape.inputs(with_logits=False), shape.device, repeats)
    gemm = gemm_speed(shape, repeats)
    flop = 6 * shape.rows * shape.vocab_size * shape.hidden_size
    lines = [
        "From hidden states. TFLOP/s counts the three GEMMs that every form needs (the linear form does four); "
        f"one GEMM runs at {gemm / 1e12:.3f} TFLOP/s here. Peak includes the gradients of hidden states and weight, "
        f"{(shape.rows + shape.vocab_size) * shape.hidden_size * shape.dtype.itemsize / MIB:.0f} MiB.",
        "",
        *header(
            ["form", "forward ms", "backward ms", "both ms", "fastest ms", "TFLOP/s", "of GEMM", "peak MiB", "of naive"]
        ),
    ]
    naive_peak = 0.0
    for name, measured in times.items():
        forward, backward, total, best = milliseconds(measured)
        peak = peak_of(shape, "head", name)
        naive_peak = naive_peak or (peak if name.startswith("naive") else 0.0)
        speed = flop / (total / 1e3)
        cells = [f"{forward:.1f}", f"{backward:.1f}", f"{total:.1f}", f"{best:.1f}"]
        lines.append(
            row(
                [
                    name,
                    *cells,
                    f"{speed / 1e12:.3f}",
                    f"{speed / gemm:.0%}",
                    f"{peak:.0f}",
                    f"{peak / naive_peak:.3f}" if naive_peak else "",
                ]
            )
        )
        if name == "ours, linear form" and naive_peak:
            bars.append(Bar(f"linear form's peak memory over naive torch's ({shape})", peak / naive_peak, 1 / 8, False))
    return lines


def chunks_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    """The linear form cut into vocabulary chunks or row blocks of each size."""
    preferred = linear_form.CPU_CHUNK_BYTES
    linear_form.CPU_CHUNK_BYTES = 2**40  # measure sizes beyond the one that these measurements chose
    sizes = [2**k * MIB for k in range(2, 10)]
    forms = {f"{size // MIB} MiB, vocabulary chunks": linear(size) for size in sizes}
    forms |= {f"{size // MIB} MiB, row blocks": linear_by_rows(size) for size in sizes[2::2]}
    forms = selected(forms, only)
    try:
        times = take_turns(forms, shape.inputs(with_logits=False), shape.device, repeats)
    finally:
        linear_form.CPU_CHUNK_BYTES = preferred
    lines = [
        "The linear form by the bytes of logits that exist at once.",
        "",
        *header(["cut", "both ms", "fastest ms"]),
    ]
    for name, measured in times.items():
        _, _, total, best = milliseconds(measured)
        lines.append(row([name, f"{total:.1f}", f"{best:.1f}"]))
    return lines


def hardware(device: str) -> str:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    model = next((s.split(":")[1].strip() for s in _lines("/proc/cpuinfo") if s.startswith("model name")), "")
    return (
        f"{model or platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start"
    )


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def versions() -> str:
    packages = ["torch", "megatron-core", "liger-kernel", "cut-cross-entropy"]
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([f"Python {platform.python_version()}", *found])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape", action="append", metavar="T,V,H", help="rows, vocabulary, hidden size; may be repeated"
    )
    parser.add_argument("--tp", type=int, default=1, help="measure one shard of V / tp columns (no communication)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated")
    parser.add_argument("--only", default="", help="measure naive torch and the forms whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--tables", nargs="+", choices=("logits", "head", "chunks"), default=["logits", "head", "chunks"]
    )
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    default = "8192,151936,4096" if options.device == "cuda" else "2048,32768,256"
    options.shape = options.shape or [default]
    options.dtype = options.dtype or (["bfloat16"] if options.device == "cuda" else ["float32", "bfloat16"])
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command = shlex.join(["python", "tools/benchmark_head.py", *(sys.argv[1:] if arguments is None else arguments)])
    title = [f"# The head on {hardware(options.device)}", "", f"`{command}`", "", versions()]
    lines: list[str] = []
    bars: list[Bar] = []
    tables = {"logits": logits_table, "head": head_table, "chunks": chunks_table}
    for text in options.shape:
        rows, vocabulary, hidden = map(int, text.split(","))
        for dtype in options.dtype:
            columns = math.ceil(vocabulary / options.tp)
            shape = Shape(rows, columns, hidden, getattr(torch, dtype), options.device)
            shard = f", the shard of one of {options.tp} ranks" if options.tp > 1 else ""
            lines += ["", f"## T = {rows}, V = {columns}, H = {hidden}, {dtype}{shard}"]
            for name in options.tables:
                print(f"{text} {dtype}: {name}", file=sys.stderr, flush=True)
                lines += ["", *tables[name](shape, options.repeats, options.only, bars)]
    summary = ["", "What it has to show:", "", *(bar.line() for bar in bars)] if bars else []
    report = "\n".join([*title, *summary, *lines]) + "\n"
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
