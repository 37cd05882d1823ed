"""flex_attention under the mask of shared prompts: errors, speed, and how often it compiles.

    python -m benchmarks.attention [--tokens 16384] [--output FILE]

Errors are those of forward and gradients against dense masked attention in float32 on the same (rounded) inputs. Speed
stands beside plain causal attention over one sequence as long, by flex_attention and by scaled_dot_product_attention,
and beside this package's attention segment by segment (its CPU path). TFLOP/s counts the pairs of tokens that the mask
admits; backward counts 2.5 times the forward's. Times of a GPU are its own, from events. Without a GPU the same runs,
uncompiled and without flex_attention's backward, which torch has on GPUs only: it shows that the benchmark works.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import report
from benchmarks.head_timing import forward_backward
from benchmarks.measure import MIB, synchronize
from benchmarks.report import Bar
from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.policy import flex
from real_megatron.policy.attention import segment_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query `[T, heads, d]`, key and value `[T, kv_heads, d]` → the query's shape."""


def shared_prompts(tokens: int, responses: int = 8) -> SegmentTree:
    """Groups of a prompt and K responses, a quarter as long each, that fill `tokens`."""
    unit = max(1, tokens // 4 // (4 + responses))
    segments: list[Segment] = []
    while sum(s.length for s in segments) + unit * (4 + responses) <= tokens:
        prompt = len(segments)
        segments += [Segment(4 * unit), *(Segment(unit, prompt) for _ in range(responses))]
    rest = tokens - sum(s.length for s in segments)
    return SegmentTree((*segments, *([Segment(rest)] if rest else [])))


def ours(tree: SegmentTree, scale: float, window: int | None = None) -> Attention:
    return lambda q, k, v: flex.flex_segment_attention(q, k, v, tree, scale, window)


def by_segment(tree: SegmentTree, scale: float, window: int | None = None) -> Attention:
    return lambda q, k, v: segment_attention(q, k, v, tree, scale, window)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) > k.size(1))
    return out[0].transpose(0, 1)


def dense(tree: SegmentTree, scale: float, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the inputs' dtype."""
    repeats = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree.mask(window).to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def inputs(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(tokens, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for shape in shapes]


def results(attend: Attention, tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """The output and, with `backward`, the gradients of query, key and value."""
    *leaves, grad = (x.clone().requires_grad_(backward) for x in tensors)
    out = attend(*leaves)
    if backward:
        out.backward(grad.detach())
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def errors_table(args: argparse.Namespace) -> list[str]:
    """The largest error of each result, over the largest number of it."""
    tree = shared_prompts(args.error_tokens)
    rows = []
    for kv_heads in (args.heads, args.kv_heads):
        for dtype in (torch.float32, torch.bfloat16):
            for window in (None, args.error_tokens // 8):
                tensors = inputs(tree.total, args.heads, kv_heads, args.dim, dtype)
                scale = args.dim**-0.5
                exact = results(partial(dense, tree, scale, window), [x.float() for x in tensors], backward=True)
                for name, attend in (
                    ("flex", ours(tree, scale, window)),
                    ("by segment", by_segment(tree, scale, window)),
                ):
                    found = results(attend, tensors, backward=DEVICE == "cuda" or name != "flex")
                    shown = [
                        f"{(a.float() - b).abs().max() / b.abs().max():.1e}" for a, b in zip(found, exact, strict=False)
                    ]
                    setting = [f"{args.heads}/{kv_heads}", str(dtype).removeprefix("torch."), window or "–"]
                    rows.append([name, *setting, *shown, *["–"] * (4 - len(shown))])
    header = ["attention", "heads", "dtype", "window", "output", "d query", "d key", "d value"]
    return [
        f"Errors against dense float32 attention, {tree.total} tokens in {len(tree.segments)} segments: the largest "
        "difference over the largest number.",
        "",
        *report.table(header, rows, left=4),
    ]


def speed_table(args: argparse.Namespace) -> list[str]:
    """Forward and backward at `--tokens`, multi-head and grouped-query."""
    tree, causal = shared_prompts(args.tokens), SegmentTree((Segment(args.tokens),))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    rows = []
    for kv_heads in (args.heads, args.kv_heads):
        *leaves, grad = inputs(args.tokens, args.heads, kv_heads, args.dim, dtype)
        scale = args.dim**-0.5
        for name, attend, mask in (
            ("**ours: flex, shared prompts**", ours(tree, scale), tree),
            ("flex, one causal sequence", ours(causal, scale), causal),
            ("scaled_dot_product_attention, one causal sequence", sdpa, causal),
            ("by segment, shared prompts", by_segment(tree, scale), tree),
        ):
            backward = DEVICE == "cuda" or "flex" not in name
            started = time.perf_counter()
            results(attend, [*leaves, grad], backward)
            synchronize(DEVICE)
            first = time.perf_counter() - started
            times = [timed(attend, leaves, grad, backward) for _ in range(args.repeats)]
            forward, back = (statistics.median(column) for column in zip(*times, strict=True))
            flop = 4 * args.heads * args.dim * mask.attention_pairs()
            cells = [f"{forward * 1e3:.2f}", f"{flop / forward / 1e12:.1f}"]
            cells += [f"{back * 1e3:.2f}", f"{2.5 * flop / back / 1e12:.1f}"] if backward else ["–", "–"]
            rows.append([name, f"{args.heads}/{kv_heads}", *cells, f"{mask.attention_pairs():,}", f"{first:.1f}"])
    started = time.perf_counter()
    flex._mask.__wrapped__(tree, None, None, torch.device(DEVICE))
    synchronize(DEVICE)
    header = ["attention", "heads", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "pairs", "first call, s"]
    return [
        f"{args.tokens:,} tokens, heads of {args.dim}, {str(dtype).removeprefix('torch.')}; medians of {args.repeats}. "
        "The first call compiles.",
        "",
        *report.table(header, rows, left=2),
        "",
        f"The mask of shared prompts is built in {(time.perf_counter() - started) * 1e3:.1f} ms, once for all layers "
        "of a micro-batch.",
    ]


def timed(attend: Attention, leaves: list[Tensor], grad: Tensor, backward: bool) -> tuple[float, float]:
    """Seconds of forward and of backward (0 without it)."""
    if backward:
        fresh = [x.detach().requires_grad_() for x in leaves]
        return forward_backward(lambda: attend(*fresh), grad, DEVICE)
    started = time.perf_counter()
    with torch.no_grad():
        attend(*leaves)
    return time.perf_counter() - started, 0.0


def recompiles(args: argparse.Namespace, bars: list[Bar]) -> list[str]:
    """Graphs that 30 mixes of lengths compile, with gradients, then one without, and one below a block of tokens."""
    rng = random.Random(0)
    torch._dynamo.reset()
    counters.clear()
    flex._kernel.cache_clear()

    def graphs_after(tree: SegmentTree, backward: bool) -> int:
        tensors = inputs(tree.total, args.heads, args.kv_heads, args.dim, torch.float32)
        results(ours(tree, args.dim**-0.5), tensors, backward and DEVICE == "cuda")
        return int(counters["stats"]["unique_graphs"])

    counts, peaks = [], []
    for _ in range(args.mixes):
        prompt = rng.randrange(300, 900)
        tree = SegmentTree(
            (Segment(prompt), *(Segment(rng.randrange(20, 300), 0) for _ in range(rng.randrange(2, 12))))
        )
        counts.append(graphs_after(tree, True))
        peaks.append(torch.cuda.memory_allocated() / MIB if DEVICE == "cuda" else 0.0)
    without = graphs_after(SegmentTree((Segment(700), Segment(90, 0))), False)
    short = graphs_after(SegmentTree((Segment(60), Segment(20, 0))), True)
    if DEVICE == "cuda":
        bars.append(Bar(f"graphs compiled for {args.mixes} mixes of lengths", counts[-1], 2, False))
    return [
        f"Graphs compiled after each of {args.mixes} mixes of lengths (one prompt of 300 to 899 tokens and 2 to 11 "
        f"responses, with gradients): {', '.join(map(str, counts))}. Expected: 1, compiled for all lengths at once "
        "(at most 2: torch may compile anew for the second length). "
        f"After a forward pass without gradients: {without} (expected: one more); after one of 80 tokens, less than a "
        f"block: {short} (expected: one more)."
        + ("" if DEVICE == "cuda" else " Without a GPU these are of torch's uncompiled form, and say nothing."),
        *([f"Memory allocated after each, MiB: {', '.join(f'{p:.0f}' for p in peaks)}."] if DEVICE == "cuda" else []),
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of the table of speeds")
    parser.add_argument("--error-tokens", type=int, default=2048, help="of the table of errors, whose mask is dense")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8, help="of the grouped-query rows")
    parser.add_argument("--dim", type=int, default=128, help="size of a head")
    parser.add_argument("--mixes", type=int, default=30, help="length mixes of the count of compilations")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the report there as well, table by table")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    preamble = report.preamble(
        "Attention under shared prompts",
        report.hardware(DEVICE),
        report.software("triton"),
        report.command("attention", {"--output": "FILE"}),
    )
    lines: list[str] = []
    bars: list[Bar] = []
    for make in (errors_table, speed_table, partial(recompiles, bars=bars)):
        lines += ["", *make(args)]
        report.save([*preamble, *lines], args.output)
    summary = ["", "What it has to show:", "", *(bar.line() for bar in bars)] if bars else []
    report.publish([*preamble, *summary, *lines], args.output)


if __name__ == "__main__":
    main()
