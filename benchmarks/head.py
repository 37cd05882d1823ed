"""The head beside what peers use, in one run: time, bytes/s beside a copy, FLOP/s beside a GEMM, peak memory.

    python -m benchmarks.head [--device cuda] [--shape T,V,H …] [--tensor 4] [--dtype bfloat16] [--output FILE]
    python -m benchmarks.head --device cuda --shape 8192,151936,4096 --dtype bfloat16 --output …/head_h200.md
    python -m benchmarks.head --tables logits head --dtype float32 --repeats 3 --output FILE

The last one takes minutes on two idle cores. A report begins with what the head has to show, each beside its bar: on a
CPU the speed of the C++ counterpart and the memory of the linear form, on a GPU what benchmarks/head_bars.py says. Each
shape gives three tables: kernels over logits that exist; the whole head from hidden states; chunk sizes of the linear
form. Contenders take turns, and the median and the fastest of their repeats are shown; times of a GPU are its own, from
events. Peak memory is what forward and backward need beyond their inputs, gradients included: on a GPU from its
allocator, on a CPU the largest resident set of a process that runs nothing else. Megatron-Core, Liger-Kernel and
cut-cross-entropy are measured where they are installed and run on the device. Every row asks for one id:
cross-entropies know no more.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch

from benchmarks import head_bars, report
from benchmarks.head_contenders import Shape, contenders, linear, linear_by_rows, selected
from benchmarks.head_timing import copy_speed, gemm_speed, milliseconds, peak_of, process_group, take_turns
from benchmarks.measure import MIB
from benchmarks.report import Bar
from real_megatron.head import linear as linear_form


def logits_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    """Kernels over logits that exist."""
    chosen = selected(contenders(shape.device)[0], only)
    with process_group(shape.device) if any("Megatron" in name for name in chosen) else contextlib.nullcontext():
        times = take_turns(chosen, shape.inputs(with_logits=True), shape.device, repeats)
    copy = copy_speed(shape, repeats)
    ideal_bytes = 3 * shape.rows * shape.vocab_size * shape.dtype.itemsize
    rows = []
    reference = milliseconds(next(iter(times.values())))[2]
    for name, measured in times.items():
        forward, backward, total, best = milliseconds(measured)
        speed = ideal_bytes / (total / 1e3)
        peak = peak_of(shape, "logits", name)
        cells = [f"{forward:.2f}", f"{backward:.2f}", f"{total:.2f}", f"{best:.2f}", f"{reference / total:.2f}×"]
        rows.append([name, *cells, f"{speed / 1e9:.1f}", f"{speed / copy:.0%}", f"{peak:.0f}"])
        if name == "ours, fused" and shape.device == "cpu":
            what = f"C++ counterpart's speed, forward + backward, over naive torch's ({shape})"
            bars.append(Bar(what, reference / total, 2, True))
        if name == "ours, fused, in place" and shape.device == "cuda":
            bars += head_bars.over_logits(shape, total, ideal_bytes / copy * 1e3)
    header = ["contender", "forward ms", "backward ms", "both ms", "fastest ms"]
    header += ["speed-up", "GB/s", "of copy", "peak MiB"]
    return [
        "Over existing logits. GB/s counts the bytes that have to move (one read; one read and one write); "
        f"a copy moves {copy / 1e9:.1f} GB/s here.",
        "",
        *report.table(header, rows),
    ]


def head_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    """The whole head, from hidden states."""
    chosen = selected(contenders(shape.device)[1], only)
    with process_group(shape.device) if any("Megatron" in name for name in chosen) else contextlib.nullcontext():
        times = take_turns(chosen, shape.inputs(with_logits=False), shape.device, repeats)
    gemm = gemm_speed(shape, repeats)
    gradients = (shape.rows + shape.vocab_size) * shape.hidden_size * shape.dtype.itemsize
    flop = 6 * shape.rows * shape.vocab_size * shape.hidden_size
    rows = []
    naive_peak = 0.0
    for name, measured in times.items():
        forward, backward, total, best = milliseconds(measured)
        peak = peak_of(shape, "head", name)
        naive_peak = naive_peak or (peak if name.startswith("naive") else 0.0)
        speed = flop / (total / 1e3)
        cells = [f"{forward:.2f}", f"{backward:.2f}", f"{total:.2f}", f"{best:.2f}"]
        cells += [f"{speed / 1e12:.3f}", f"{speed / gemm:.0%}", f"{peak:.0f}"]
        rows.append([name, *cells, f"{peak / naive_peak:.3f}" if naive_peak else ""])
        if name == "ours, linear form" and naive_peak:
            bars.append(Bar(f"linear form's peak memory over naive torch's ({shape})", peak / naive_peak, 1 / 8, False))
        if name == "ours, linear form" and shape.device == "cuda":
            bars += head_bars.from_hidden(shape, total, peak - gradients / MIB)
    header = [
        "contender",
        "forward ms",
        "backward ms",
        "both ms",
        "fastest ms",
        "TFLOP/s",
        "of GEMM",
        "peak MiB",
        "of naive",
    ]
    return [
        "From hidden states. TFLOP/s counts the three GEMMs that every contender needs (the linear form does four); "
        f"one GEMM runs at {gemm / 1e12:.3f} TFLOP/s here. Peak includes the gradients of hidden states and weight, "
        f"{gradients / MIB:.0f} MiB.",
        "",
        *report.table(header, rows),
    ]


def chunks_table(shape: Shape, repeats: int, only: str, bars: list[Bar]) -> list[str]:
    """The linear form in vocabulary chunks or row chunks of each size."""
    preferred = linear_form.CPU_CHUNK_BYTES
    linear_form.CPU_CHUNK_BYTES = 2**40  # measure sizes beyond the one that these measurements chose
    sizes = [2**k * MIB for k in range(2, 10)]
    chosen = {f"{size // MIB} MiB, vocabulary chunks": linear(size) for size in sizes}
    chosen |= {f"{size // MIB} MiB, row chunks": linear_by_rows(size) for size in sizes[2::2]}
    chosen = selected(chosen, only)
    try:
        times = take_turns(chosen, shape.inputs(with_logits=False), shape.device, repeats)
    finally:
        linear_form.CPU_CHUNK_BYTES = preferred
    rows = []
    for name, measured in times.items():
        _, _, total, best = milliseconds(measured)
        rows.append([name, f"{total:.1f}", f"{best:.1f}"])
    return [
        "The linear form by the bytes of logits that exist at once.",
        "",
        *report.table(["chunks", "both ms", "fastest ms"], rows),
    ]


TABLES = {"logits": logits_table, "head": head_table, "chunks": chunks_table}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape", action="append", metavar="T,V,H", help="rows, vocabulary, hidden size; may be repeated"
    )
    parser.add_argument(
        "--tensor", type=int, default=1, help="measure one shard of V / tensor columns (no communication)"
    )
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated")
    parser.add_argument("--only", default="", help="measure naive torch and the contenders whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    default = "8192,151936,4096" if options.device == "cuda" else "2048,32768,256"
    options.shape = options.shape or [default]
    options.dtype = options.dtype or (["bfloat16"] if options.device == "cuda" else ["float32", "bfloat16"])
    return options


def main() -> None:
    options = parse()
    preamble = report.preamble(
        "The head: speed and memory",
        report.hardware(options.device),
        report.software("megatron-core", "liger-kernel", "cut-cross-entropy"),
        report.command("head"),
    )
    lines: list[str] = []
    bars: list[Bar] = []
    for text in options.shape:
        rows, vocabulary, hidden = map(int, text.split(","))
        for dtype in options.dtype:
            columns = math.ceil(vocabulary / options.tensor)
            shape = Shape(rows, columns, hidden, getattr(torch, dtype), options.device)
            shard = f", the shard of one of {options.tensor} ranks" if options.tensor > 1 else ""
            lines += ["", f"## T = {rows}, V = {columns}, H = {hidden}, {dtype}{shard}"]
            for name in options.tables:
                print(f"{text} {dtype}: {name}", file=sys.stderr, flush=True)
                lines += ["", *TABLES[name](shape, options.repeats, options.only, bars)]
    summary = ["", "What it has to show:", "", *(bar.line() for bar in bars)] if bars else []
    report.publish([*preamble, *summary, *lines], options.output)


if __name__ == "__main__":
    main()
