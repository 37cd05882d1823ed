"""What the host does in a step and at a start, before and after the work was taken off the world's size.

    python -m benchmarks.host [--parts responses texts …] [--ranks 2 8 32] [--output benchmarks/results/host_cpu.md]

Each part has a file beside this one: the old way, kept there, and the package's code, on the same work. Ranks are gloo
processes of this machine, more of them than it has cores: seconds there are those of all ranks' work on few cores.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.host.row import Row

PARTS = ("responses", "texts", "metrics", "data", "weights", "checkpoints")
TARGET = 256
COUNTED = ("texts", "weights", "checkpoints")
"""Parts that count, and do not run, at so many ranks."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which parts; default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 32], help="numbers of ranks")
    parser.add_argument("--output", type=Path, help="write the page there too")
    return parser.parse_args(arguments)


def extrapolated(points: Sequence[Row], value: str) -> float | None:
    """The value at `TARGET` ranks, from those of the two largest numbers of ranks n < m: the same where it hardly
    changes, L (n − 1) / n where it grows like that (what comes from all others of a whole L), else on the line."""
    known = [(row.ranks, getattr(row, value)) for row in points if getattr(row, value) is not None]
    if len(known) < 2:
        return None
    (n, a), (m, b) = known[-2:]
    near = 0.05 * b
    if abs(b - a) <= near:
        return float(b)
    if n > 1 and abs((whole := a * n / (n - 1)) * (m - 1) / m - b) <= near:
        return float(whole * (TARGET - 1) / TARGET)
    return float(max(b + (b - a) / (m - n) * (TARGET - m), 0.0))


def page(rows: Sequence[Row], preamble: Sequence[str]) -> list[str]:
    """The tables of what is measured so far."""
    lines = [
        *preamble,
        "",
        "A rank's seconds, the bytes that it receives from others or reads from files, and the memory that it needs on "
        f"top; of the rank that has the most. At {TARGET} ranks: counted, or extrapolated from the last two. "
        "Counted: worked out from sizes by the same code, not run. Ranks share the cores above, so that seconds of "
        "what every rank does grow with the ranks here, where on a cluster they would not.",
    ]
    for part in dict.fromkeys(row.part for row in rows):
        ways = {way: [row for row in rows if row.part == part and row.variant == way] for way in ("before", "after")}
        sizes = sorted({row.ranks for way in ways.values() for row in way})
        table = []
        for ranks in sizes:
            found = [next((row for row in ways[way] if row.ranks == ranks), None) for way in ("before", "after")]
            how = next(row.how for row in found if row is not None)
            table.append([f"{ranks:,}", *_pairs(found), how])
        if sizes[-1] < TARGET and len(sizes) > 1:
            ends = [
                Row(part, "after", TARGET, *(extrapolated(way, v) for v in ("seconds", "moved", "held")), "counted")
                for way in ways.values()
            ]
            table.append([str(TARGET), *_pairs(ends), "extrapolated"])
        header = ["ranks"]
        for what in ("seconds", "bytes in", "memory"):
            header += [f"{what}: before", "after"]
        lines += ["", f"## {part[0].upper()}{part[1:]}", "", *report.table([*header, ""], table, left=0)]
    return lines


def _pairs(found: Sequence[Row | None]) -> list[str]:
    return [
        *(_seconds(row and row.seconds) for row in found),
        *(_bytes(row and row.moved) for row in found),
        *(_bytes(row and row.held) for row in found),
    ]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def main() -> None:
    args = parse()
    preamble = report.preamble(
        "Host work, before and after",
        report.hardware("cpu"),
        report.software("megatron-core", "transformers", "tokenizers"),
        report.command("host"),
    )
    rows: list[Row] = []
    for part in args.parts:
        module = importlib.import_module(f"benchmarks.host.{part}")
        for ranks in [*args.ranks, *((TARGET,) if part in COUNTED and TARGET not in args.ranks else ())]:
            rows += module.rows(ranks)
            report.save(page(rows, preamble), args.output)
    report.publish(page(rows, preamble), args.output)


if __name__ == "__main__":
    main()
