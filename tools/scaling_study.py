"""Strong and weak scaling of large judges, projected from 16 to 1,024 GPUs; and weak scaling as measured here.

    python tools/scaling_study.py                           # writes docs/scaling.md and its plots
    python tools/scaling_study.py --search                  # searches the layouts first: tools/scaling_layouts.json
    python tools/scaling_study.py --measure --ranks 1 2     # trains on this machine: python -m benchmarks.scaling

The first needs no GPU and a few seconds; the search takes minutes. What they write depends on the code alone.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from host_work import host_parts, host_table  # noqa: E402
from published import BLOG, PHASES, SLIME, STEPS, SUMMARY, SYNCS, VERL, description_of  # noqa: E402

from benchmarks.report import table  # noqa: E402
from real_megatron.config import ModelConfig, ParallelConfig  # noqa: E402
from real_megatron.hardware import GPUS, Gpu  # noqa: E402
from real_megatron.planning.efficiency import DEFAULT, Efficiency  # noqa: E402
from real_megatron.planning.memory import GIB, LayoutMemory  # noqa: E402
from real_megatron.planning.report import layout_text, servers_text  # noqa: E402
from real_megatron.planning.search import best_layouts, candidate_memory  # noqa: E402
from real_megatron.planning.servers import Servers  # noqa: E402
from real_megatron.planning.step_time import StepTime, step_time  # noqa: E402
from real_megatron.planning.workload import Layout, Workload  # noqa: E402

COMMAND = "python tools/scaling_study.py"
LAYOUTS = Path(__file__).with_name("scaling_layouts.json")
MODELS = ("Qwen3-32B", "Qwen2.5-72B", "Qwen3-235B-A22B")
SIZES = (16, 32, 64, 128, 256, 512, 1024)
GPU = GPUS["H100"]
WORKLOAD = Workload(
    prompts=256,
    responses=8,
    prompt_tokens=1000,
    response_tokens=500,
    max_prompt_tokens=2048,
    max_response_tokens=1024,
    max_tokens=16384,
)
WIDTH = 120
SENSITIVITY_SIZES = (64, 256, 1024)
HOST_WORK = (("Qwen3-32B", 32), ("Qwen3-235B-A22B", 256))


@dataclass(frozen=True)
class Point:
    """A layout on a number of GPUs, its servers' among them."""

    layout: Layout
    workload: Workload
    servers: Servers

    @property
    def gpus(self) -> int:
        return self.layout.world + self.servers.gpus

    @cached_property
    def time(self) -> StepTime:
        """Projected."""
        return step_time(self.layout, self.workload, GPU, self.servers)

    @cached_property
    def memory(self) -> LayoutMemory:
        """Estimated."""
        return candidate_memory(self.layout, self.workload, GPU, self.servers)

    @property
    def rate(self) -> float:
        """Responses a second and GPU."""
        return self.workload.prompts * self.workload.responses / self.time.total / self.gpus

    def repeated(self, times: int) -> "Point":
        """The same layout on so many times the GPUs, for so many times the prompts."""
        return Point(
            replace(self.layout, world=self.layout.world * times),
            replace(self.workload, prompts=self.workload.prompts * times),
            replace(self.servers, gpus=self.servers.gpus * times),
        )


Curves = Mapping[str, Sequence[Point]]


def search() -> dict[str, list[dict[str, Any]]]:
    """Per model, the first of the layouts that `best_layouts` ranks, at each number of GPUs on which one fits."""
    found: dict[str, list[dict[str, Any]]] = {}
    for model in MODELS:
        found[model] = []
        for gpus in SIZES:
            best = best_layouts(description_of(model), gpus, GPU, WORKLOAD, count=1).best
            print(f"{model} on {gpus} GPUs: {layout_text(best[0].layout) if best else 'nothing fits'}", flush=True)
            if best and best[0].servers is not None:
                layout = best[0].layout
                found[model].append(
                    {
                        "world": layout.world,
                        "parallel": layout.parallel.model_dump(exclude_defaults=True),
                        "recompute": layout.model.recompute,
                        "max_tokens": best[0].workload.max_tokens,
                        "servers": {"gpus": best[0].servers.gpus, "tensor": best[0].servers.tensor},
                    }
                )
    return found


def strong_scaling() -> dict[str, list[Point]]:
    """The same step on more GPUs, by the stored layouts."""
    stored = json.loads(LAYOUTS.read_text(encoding="utf-8"))
    return {model: [_point(model, one) for one in stored[model]] for model in MODELS}


def _point(model: str, one: dict[str, Any]) -> Point:
    layout = Layout(
        description_of(model),
        ParallelConfig.model_validate(one["parallel"]),
        ModelConfig.model_validate({"recompute": one["recompute"]}),
        one["world"],
    )
    return Point(layout, replace(WORKLOAD, max_tokens=one["max_tokens"]), Servers(**one["servers"]))


def weak_scaling(strong: Curves) -> dict[str, list[Point]]:
    """The layout of the first size from 64 GPUs on, repeated with its prompts."""
    curves = {}
    for model, points in strong.items():
        first = next(point for point in points if point.gpus >= 64)
        curves[model] = [first.repeated(size // first.gpus) for size in SIZES if size >= first.gpus]
    return curves


# --- the page -----------------------------------------------------------------------------------------------------


def efficiency(points: Sequence[Point], point: Point) -> float:
    """Responses a second and GPU beside those at the smallest size."""
    return point.rate / points[0].rate


def curve_table(points: Sequence[Point]) -> list[str]:
    rows = []
    for point in points:
        time = point.time
        recompute = point.layout.model.recompute
        rows.append(
            [
                f"{point.gpus:,}",
                layout_text(point.layout) + ("" if recompute == "none" else ", recomputation"),
                servers_text(point.servers),
                time.binds,
                f"{point.memory.fullest.peak / GIB:.0f}",
                f"{time.total:.1f}",
                f"{time.training:.1f}",
                f"{time.phase('rollout'):.1f}",
                f"{time.phase('sync'):.1f}",
                f"{point.workload.prompts * point.workload.responses / time.total:.1f}",
                f"{efficiency(points, point):.2f}",
            ]
        )
    header = ["GPUs", "training", "servers", "what binds", "GiB", "step, s", "training, s", "rollout, s", "sync, s"]
    return table([*header, "responses/s", "efficiency"], rows, left=4)


def breaks(curves: Curves) -> list[str]:
    """Per model, where a step stops getting faster, and what binds there."""
    lines = []
    for model, points in curves.items():
        line = f"- **{model}**: nothing fits on fewer than {points[0].gpus} GPUs. "
        if points[0].gpus == SIZES[0]:
            line = f"- **{model}**: fits on {SIZES[0]} GPUs. "
        half = next((p for p in points if efficiency(points, p) < 0.5), None)
        if half is None:
            line += f"Above half of its efficiency up to {points[-1].gpus:,}. "
        else:
            line += f"At {half.gpus:,} less than half of its efficiency is left; `{half.time.binds}` binds. "
        last = points[-1].time
        largest = sorted(last.parts, key=lambda part: -last.parts[part])[:3]
        shares = ", ".join(f"`{part}` {last.parts[part]:.1f} s" for part in largest)
        line += f"Of {last.total:.1f} s at {points[-1].gpus:,}, the largest parts are {shares}."
        lines.append(line)
    return lines


def sensitivity(curves: Curves) -> list[str]:
    """Seconds of the same layouts with other bandwidths."""

    changes: dict[str, tuple[Gpu, Efficiency]] = {
        "as assumed": (GPU, DEFAULT),
        "network × 0.5": (replace(GPU, network=GPU.network / 2), DEFAULT),
        "network × 2": (replace(GPU, network=GPU.network * 2), DEFAULT),
        "decoding × 0.5": (GPU, replace(DEFAULT, decode_memory=DEFAULT.decode_memory / 2)),
        "decoding × 2": (GPU, replace(DEFAULT, decode_memory=DEFAULT.decode_memory * 2)),
    }
    rows = []
    for model, points in curves.items():
        for point in points:
            if point.gpus in SENSITIVITY_SIZES:
                totals = [
                    step_time(point.layout, point.workload, gpu, point.servers, assumed).total
                    for gpu, assumed in changes.values()
                ]
                rows.append([model, f"{point.gpus:,}", *(f"{total:.1f}" for total in totals)])
    return table(["model", "GPUs", *changes], rows, left=2)


def published_steps() -> list[str]:
    rows = []
    for step in STEPS:
        time = step.projected()
        rows.append(
            [
                step.model,
                "blog" if step.source == BLOG else "summary",
                f"{step.gpus}{'' if step.colocated else ', 1 off'}",
                f"{step.tensor}, {step.context}, {step.expert}, {step.pipeline}; {step.server_tensor}",
                f"{step.seconds:g}",
                f"{time.total:.0f}",
                f"**{time.total / step.seconds:.2f}**",
                *(beside(step.phases.get(phase), time.phase(phase)) for phase in PHASES),
            ]
        )
    header = ["model", "source", "GPUs", "TP, CP, EP, PP; servers' TP", "published, s", "projected, s", "ratio"]
    return table([*header, "training", "log-probs", "rollout", "sync"], rows, left=4)


def beside(known: float | None, projected: float) -> str:
    """A phase's seconds, published / projected."""
    return f"{known:g} / {projected:.0f}" if known is not None else f"– / {projected:.0f}"


def published_syncs() -> list[str]:
    rows = []
    for sync in SYNCS:
        seconds, source = sync.projected(), "verl" if sync.source == VERL else "slime"
        rows.append(
            [sync.model, source, sync.set_up, f"{sync.seconds:g}", f"{seconds:.1f}", f"{seconds / sync.seconds:.2f}"]
        )
    return table(["model", "source", "set-up", "published, s", "projected, s", "ratio"], rows, left=3)


def range_of(pairs: Sequence[tuple[float, float]]) -> str:
    """The lowest and the highest ratio of projected to published seconds."""
    ratios = [projected / known for projected, known in pairs]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def phase_range(phase: str) -> str:
    """`range_of` a phase, of the steps whose source has its seconds."""
    return range_of([(step.projected().phase(phase), step.phases[phase]) for step in STEPS if phase in step.phases])


def page(strong_curves: Curves, weak_curves: Curves) -> list[str]:
    """docs/scaling.md."""
    workload = WORKLOAD
    lines = [
        "# Scaling, projected",
        "",
        f"Written by `{COMMAND}`: change the code, not this page. **No GPU has been run for it.** Every second here is "
        "a projection: counted FLOPs, bytes and messages over data-sheet rates (`real_megatron/hardware.py`) and a "
        "handful of assumed efficiencies (`real_megatron/planning/efficiency.py`), the same for all models and sizes. "
        "The columns called “published” are others' measurements, of other frameworks.",
        "",
        "1. [What is projected](#what-is-projected)",
        "2. [Beside published times](#beside-published-times)",
        "3. [Strong scaling](#strong-scaling)",
        "4. [Weak scaling](#weak-scaling)",
        "5. [If bandwidths are others](#if-bandwidths-are-others)",
        "6. [Host work, before and after](#host-work-before-and-after)",
        "7. [What is not in it](#what-is-not-in-it)",
        "8. [Measuring](#measuring)",
        "",
        "## What is projected",
        "",
        f"A step of REAL on nodes of 8 {GPU.name}s: {workload.prompts} prompts × {workload.responses} responses, "
        f"prompts of {workload.prompt_tokens:,} tokens and responses of {workload.response_tokens:g} in the mean, the "
        f"longest {workload.max_response_tokens:,}; shared prompts in micro-batches of at most {workload.max_tokens:,} "
        "tokens; one update, no KL term. Layouts are the first that `real-megatron plan`'s search ranks "
        "(`--search`; stored in `tools/scaling_layouts.json`): they fit into memory and are the fastest, or within "
        "10 % of it and simpler. Servers have GPUs of their own, which count. A step is",
        "",
        "- **rollout**: prefill by FLOPs, each prompt once; decoding by the bytes of weights, of visited experts and "
        "of the KV cache that each step reads; and the wait for the longest response, since the step waits for all;",
        "- **training**: FLOPs (shared prompts once, backward twice the forward) at an efficiency that falls for small "
        "matrix products, memory-bound kernels, the pipeline's bubble, whole micro-batches and groups on the busiest "
        "rank, and the collectives of each kind of parallelism over NVLink or the network;",
        "- **sync**: buckets that are gathered on rank 0 and broadcast by it through one adapter, one after the other, "
        "each copied to host memory meanwhile (`rollout.keep_weights`);",
        "- **host**: 1.5 ms per response for what is done on rank 0.",
        "",
        "## Beside published times",
        "",
        "GRPO steps of NeMo-RL on H100s, on their layouts and lengths: ratios of projected to published seconds are "
        f"**{range_of([(step.projected().total, step.seconds) for step in STEPS])}**. The efficiencies are one set for "
        "all rows. They were chosen from the sources that they name, with the blog's table in sight, so that its rows "
        "are no independent test. Those of the summary are one, but for the host's time per layer of experts "
        "(`moe_launch`), which was lowered from 3 to 2 ms after seeing them. Phases are further off than their sum: "
        f"training {phase_range('update')}, log-probs {phase_range('log-probs')}, rollout {phase_range('rollout')}, "
        f"sync {phase_range('sync')}.",
        "",
        *published_steps(),
        "",
        f"Sources: blog, {BLOG}; summary, {SUMMARY}. What differs from this package: they do not share prompts (the "
        "projection does not either), they pack up to the longest sequence (4,096 or 8,192 tokens), their servers are "
        "vLLM's, their sync goes from every rank to its own server rather than through rank 0, experts are whole on a "
        "rank where ours have the tensor-parallel size of the layout (EP is smaller by that here), and off-policy rows "
        "(“1 off”) update weights while they generate. Phases: published / projected seconds.",
        "",
        "Weight syncs by themselves, here without the copy to host memory:",
        "",
        *published_syncs(),
        "",
        f"Sources: {VERL}; {SLIME}. verl says that it is bound by assembling whole tensors and by converting experts "
        "one by one, not by the wire; its trainers there are FSDP's or offload weights, which the projection has no "
        "term for. **Syncs are the least certain part**: the projection is below all of verl's, by 2 to 6 times.",
        "",
        "## Strong scaling",
        "",
        "The same step on more GPUs. Efficiency: responses/s and GPU beside those at the model's smallest size.",
        "",
        "![Projected seconds of a step](images/scaling_strong.png)",
        "",
    ]
    for model, points in strong_curves.items():
        lines += [f"**{model}**", "", *curve_table(points), ""]
    lines += [
        "Where it breaks, and why:",
        "",
        *breaks(strong_curves),
        "",
        f"A step of {workload.prompts} prompts has {workload.prompts} groups: more data-parallel ranks than that have "
        "nothing to do. Decoding cannot be shortened by GPUs beyond the time of one response's tokens, one after the "
        "other, and the sync does not get shorter at all.",
        "",
        "## Weak scaling",
        "",
        "The layout of the first size from 64 GPUs on, repeated: as many times the data-parallel ranks, servers and "
        "prompts.",
        "",
        "![Projected efficiency](images/scaling_weak.png)",
        "",
    ]
    for model, points in weak_curves.items():
        lines += [f"**{model}**", "", *curve_table(points), ""]
    lines += [
        "## If bandwidths are others",
        "",
        "Projected seconds of the layouts above (strong scaling), when the network between nodes is slower or faster, "
        "and when servers read their memory slower or faster while they decode:",
        "",
        *sensitivity(strong_curves),
        "",
        "## Host work, before and after",
        "",
        "What the hosts do around the GPUs' work, in a step with servers, and at a save and a resume: as it was when "
        "every rank got, cut and counted all responses, weights were exported to every rank in the table's order and "
        "checkpoints gathered the optimizer's state; and now. Seconds are waited for by all GPUs. Bytes come to the "
        "node, or the rank, that has the most. Rates of one core and bytes a token are measured "
        "([benchmarks/results/host_cpu.md](../benchmarks/results/host_cpu.md), `python -m benchmarks.host`), the rest "
        "is counted or projected (`tools/host_work.py`).",
        "",
        *host_work(strong_curves),
        "",
        "## What is not in it",
        "",
        "Stragglers and failures; evaluation and checkpoints; the first steps, in which kernels compile; the spread of "
        "prompt lengths; a scale-out network with less than one adapter a GPU, or oversubscribed; servers' prefix "
        "caches that overflow. Training the longest micro-batches takes longer than the mean in a pipeline.",
        "",
        "## Measuring",
        "",
        f"`{COMMAND} --measure --ranks 1 2 4 8` trains on the machine at hand, a fixed amount of work a rank, and puts "
        "tokens/s and efficiency beside the projection where the GPU is in the table; so far with gloo on a CPU "
        "([benchmarks/results/scaling_cpu.md](../benchmarks/results/scaling_cpu.md)), which says nothing about GPUs. "
        "`tools/gpu_acceptance.sh` is what to run first on a GPU ([gpu_acceptance.md](gpu_acceptance.md)).",
    ]
    return lines


def host_work(curves: Curves) -> list[str]:
    """The table of the host's work, of the layouts that `HOST_WORK` names."""
    models = []
    for model, gpus in HOST_WORK:
        point = next(point for point in curves[model] if point.gpus == gpus)
        parts = host_parts(point.layout, point.workload, point.servers, GPU)
        models.append((f"{model.removeprefix('Qwen3-')} on {gpus} GPUs", parts))
    return host_table(models)


def wrapped(lines: Sequence[str]) -> str:
    """The text of the page: paragraphs and list items in lines of 120 characters."""

    def one(line: str) -> str:
        if line.startswith(("|", "#", "!")) or len(line) <= WIDTH:
            return line
        indent = "  " if line.startswith("- ") else ""
        return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return "\n".join(map(one, lines)) + "\n"


# --- plots --------------------------------------------------------------------------------------------------------


def plot(path: Path, curves: Curves, value: Callable[[Sequence[Point], Point], float], title: str, unit: str) -> None:
    """A line a model over the number of GPUs."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for model, points in curves.items():
        ax.plot([p.gpus for p in points], [value(points, p) for p in points], marker="o", markersize=4, label=model)
    ax.set_xscale("log", base=2)
    ax.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("H100 GPUs")
    ax.set_ylabel(unit)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def write(docs: Path) -> None:
    """Write scaling.md and its plots into a folder."""
    strong_curves = strong_scaling()
    weak_curves = weak_scaling(strong_curves)
    (docs / "scaling.md").write_text(wrapped(page(strong_curves, weak_curves)), encoding="utf-8")
    plot(
        docs / "images" / "scaling_strong.png",
        strong_curves,
        lambda points, point: point.time.total,
        "Strong scaling, projected: 256 prompts × 8 responses",
        "seconds of a step",
    )
    plot(
        docs / "images" / "scaling_weak.png",
        weak_curves,
        efficiency,
        "Weak scaling, projected: prompts grow with GPUs",
        "efficiency",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", action="store_true", help="train here instead; further options: benchmarks.scaling"
    )
    parser.add_argument("--search", action="store_true", help="search the layouts first, for minutes")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write into")
    args, rest = parser.parse_known_args()
    if args.measure:
        from benchmarks import scaling

        sys.argv[1:] = rest  # what the page shows as its command
        scaling.main(rest)
        return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.search:
        LAYOUTS.write_text(json.dumps(search(), indent=1) + "\n", encoding="utf-8")
    write(args.docs)


if __name__ == "__main__":
    main()
