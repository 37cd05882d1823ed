"""One REAL training step beside what peers run, on the lengths of a real judge benchmark, in one run.

    python -m benchmarks.step [--k 4 8 16] [--scales] [--output benchmarks/results/step_cpu.md]

Contenders, all on the same random model, the same groups and the same objective:

    ours       shared prompts, one forward pass, response-only linear head (this package's step)
    (b)        Megatron per-sequence packing: this package's step with share_prompt off
    (a)        transformers as peers run it: the K responses of a prompt as K padded sequences; a scoring pass (rewards,
               old log-probs), then the update; full logits and log_softmax; torch's AdamW
    binary     ours with a binary-reward RLOO objective: what the reward costs
    hundred    ours with the scores 0 to 100 in single digits, a tree of tokens, instead of 1 to 5: what the scale costs

Each contender runs in a process of its own, so that peak memory is its own, and takes turns with the others; with
`--one-by-one` (a) and (b) have the machine to themselves, since a GPU's memory does not hold all of them. Before the
clock starts, the gradients of ours and (b) are compared with those of (a). The reward and the scale cost little beside
a step's noise: ours alternates with binary, and then with hundred, for `--pairs` more steps each, and the median of
their ratios is given. `--scales` measures ours and hundred alone. MFU counts the model FLOPs of the step (prompts
once, the mask's pairs, backward twice the forward) over what one large GEMM reaches here. Qwen3-0.6B on a GPU:

    python -m benchmarks.step --hidden 1024 --ffn 3072 --layers 28 --vocab 151936 --heads 16 --kv-heads 8 \
        --head-dim 128 --tied --padded-tokens 8192 --one-by-one --output FILE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import report
from benchmarks.measure import MIB, fastest, peak_bytes, reset_peak, synchronize
from benchmarks.report import Bar
from benchmarks.step_contenders import (
    CONTENDERS,
    DEVICE,
    DTYPE,
    TOKENS_PER_WORD,
    add_model_sizes,
    build,
    make_groups,
    model_config,
    scores_of,
)
from real_megatron.batch.packing import rows_of, tokens_of, tree_of
from real_megatron.bridge import describe
from real_megatron.policy import flops

SCALE_BAR_K = 8
"""Responses per prompt at which the cost of a 0 to 100 scale has a bound."""


def work(args: argparse.Namespace) -> None:
    """A contender's process: one JSON line in (`step`, `gradients FILE`, `quit`), one out."""
    groups = make_groups(args.k[0], args.prompts, args.vocab)
    contender = build(args.contender, Path(args.checkpoint), args)
    before = peak_bytes(DEVICE)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command, _, target = line.strip().partition(" ")
        if command == "gradients":
            torch.save(contender.gradients(groups), target)
            print(json.dumps({"done": True}), flush=True)
        elif command == "step":
            if DEVICE == "cuda":
                reset_peak(DEVICE)  # the gradients came from this process
            synchronize(DEVICE)
            started = time.perf_counter()
            metrics = contender.step(groups)
            synchronize(DEVICE)
            seconds = time.perf_counter() - started
            peak = peak_bytes(DEVICE) - before
            print(json.dumps({"seconds": seconds, "peak": peak, "loss": metrics["loss"]}), flush=True)
        else:
            return


class Contender:
    """A contender's process, seen from the benchmark."""

    def __init__(self, name: str, checkpoint: Path, k: int, argv: list[str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *argv]
        command += ["--contender", name, "--checkpoint", str(checkpoint), "--k", str(k)]
        # A file, which takes any number of warnings; a pipe that nobody reads would block the process.
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            errors="replace",
        )

    def read(self) -> dict[str, float]:
        """The next answer; the first one says that the process is ready."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(self.errors.read())

    def ask(self, command: str) -> dict[str, float]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def largest_difference(found: Path, expected: Path) -> float:
    """Largest ‖Δ‖ / ‖g‖ over the tensors of two gradient files."""
    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True) for path in (found, expected))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].double() - theirs[n].double()).norm() / theirs[n].double().norm()) for n in theirs)


def cost_ratio(above: Contender, below: Contender, pairs: int) -> float:
    """Median ratio of the seconds of a step of one contender and of a step of another right before or after it."""
    ratios = []
    for turn in range(pairs):
        first, second = (above, below) if turn % 2 == 0 else (below, above)
        seconds = {id(contender): contender.ask("step")["seconds"] for contender in (first, second)}
        ratios.append(seconds[id(above)] / seconds[id(below)])
    return statistics.median(ratios)


def measure(k: int, checkpoint: Path, args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, float]]:
    """Interleaved steps of all contenders at one K: fastest time, peak memory of a step, gradient difference of
    (b) and ours, and for ours what the reward and the scale cost."""
    names = ("ours", "hundred") if args.scales else CONTENDERS
    compared = [name for name in ("a", "b", "ours") if not args.scales]
    together = ("ours", "binary", "hundred") if args.one_by_one and not args.scales else names
    alone = [name for name in names if name not in together]
    results: dict[str, dict[str, float]] = {name: {"seconds": float("inf")} for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        if not args.one_by_one:
            for name in compared:
                contender = Contender(name, checkpoint, k, argv)
                contender.read()
                contender.ask(f"gradients {scratch}/{name}")
                contender.close()
        for turn in (*((name,) for name in alone), together):
            contenders = {name: Contender(name, checkpoint, k, argv) for name in turn}
            for contender in contenders.values():
                contender.read()
            if args.one_by_one and turn[0] in compared:
                contenders[turn[0]].ask(f"gradients {scratch}/{turn[0]}")
            for _ in range(args.repeats):
                for name, contender in contenders.items():
                    answer = contender.ask("step")
                    results[name]["seconds"] = min(results[name]["seconds"], answer["seconds"])
                    results[name]["peak"] = answer["peak"]
            if "binary" in contenders:
                results["ours"]["reward_cost"] = cost_ratio(contenders["ours"], contenders["binary"], args.pairs)
            if "hundred" in contenders:
                results["ours"]["scale_cost"] = cost_ratio(contenders["hundred"], contenders["ours"], args.pairs)
            for contender in contenders.values():
                contender.close()
        for name in compared[1:]:
            results[name]["difference"] = largest_difference(Path(scratch, name), Path(scratch, "a"))
    return results


def table(results: dict[int, dict[str, dict[str, float]]], peak_flops: float, args: argparse.Namespace) -> list[str]:
    """The steps at each K, and what the reward and the scale cost."""
    description = describe(model_config(args))
    header = ["K", "step", "seconds", "ours is faster by", "peak memory of a step, MiB", "ours needs"]
    header += ["gradients, rel. difference to (a)", "tokens through the model", "model TFLOP", "MFU"]
    lines: list[list[object]] = []
    for k, rows in results.items():
        groups = make_groups(k, args.prompts, args.vocab)
        labels = {
            "a": "(a) transformers, scoring pass + update",
            "b": "(b) Megatron, prompts not shared",
            "ours": "**ours**",
            "binary": "ours, binary-reward RLOO",
            "hundred": "ours, scores 0 to 100",
        }
        ours = rows["ours"]
        for name, row in rows.items():
            scores = scores_of(name)
            tokens = sum(tokens_of(g, scores, share_prompt=name not in ("a", "b")) for g in groups)
            tokens *= 2 if name == "a" else 1
            work = sum(flops.training_flops(description, tree_of(g, scores), rows_of(g, scores)) for g in groups)
            difference = f"{row['difference']:.1e}" if "difference" in row else "–"
            cells = [f"{row['seconds']:.3f}", f"{row['seconds'] / ours['seconds']:.2f}×"]
            mfu = f"{work / row['seconds'] / peak_flops:.0%}"
            cells += [f"{row['peak'] / MIB:.0f}", f"{ours['peak'] / row['peak']:.2f}×"]
            lines.append([k, labels[name], *cells, difference, f"{tokens:,}", f"{work / 1e12:.3f}", mfu])
    said = []
    for cost, what in (
        ("reward_cost", "A REAL step takes, of a binary-reward RLOO step of the same batch"),
        ("scale_cost", "A step with the scores 0 to 100 takes, of one with 1 to 5 on the same responses"),
    ):
        found = [f"{rows['ours'][cost]:.3f} at K = {k}" for k, rows in results.items() if cost in rows["ours"]]
        if found:
            said += ["", f"{what} (median of {args.pairs} pairs): {', '.join(found)}."]
    return [*report.table(header, lines, left=2), *said]


def gemm_flops() -> float:
    """FLOP/s of a large matrix product in the dtype of the contenders."""
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    return 2 * size**3 / fastest(lambda: a @ b, DEVICE, 5)


def bars(results: dict[int, dict[str, dict[str, float]]], args: argparse.Namespace) -> list[str]:
    """What the step has to show: what scores of several tokens cost; and on a GPU its speed, at the size of a model
    that is trained there."""
    found = [
        Bar(f"a step with the scores 0 to 100 over one with 1 to 5, K = {k}", rows["ours"]["scale_cost"], 1.15, False)
        for k, rows in results.items()
        if k == SCALE_BAR_K
    ]
    if DEVICE != "cpu" and args.vocab >= 100_000 and not args.scales:
        ratios = {k: rows["a"]["seconds"] / rows["ours"]["seconds"] for k, rows in results.items()}
        found += [Bar(f"speed of a step over transformers' way, K = {k}", r, 5, True) for k, r in ratios.items()]
    return ["What it has to show:", "", *(bar.line() for bar in found), ""] if found else []


def page(
    results: dict[int, dict[str, dict[str, float]]],
    size: int,
    peak_flops: float,
    args: argparse.Namespace,
    preamble: list[str],
) -> list[str]:
    """The lines of the result page; `size` is the model's number of parameters."""
    return [
        *preamble,
        f"- One GEMM of the contenders' dtype: {peak_flops / 1e12:.3g} TFLOP/s",
        f"- Model: random Qwen3, {size / 1e6:.1f}M parameters (hidden {args.hidden}, {args.layers} layers, vocabulary "
        f"{args.vocab}), {str(DTYPE).removeprefix('torch.')}; {args.prompts} prompts a step",
        "- Lengths: Vicuna Bench in Prometheus format (benchmarks/lengths/vicuna_bench.json), "
        f"{TOKENS_PER_WORD} tokens a word",
        *([f"- (a) in padded micro-batches of at most {args.padded_tokens} tokens"] if args.padded_tokens else []),
        "",
        *bars(results, args),
        *table(results, peak_flops, args),
        "",
        f"Fastest of {args.repeats} {'' if args.one_by_one else 'interleaved '}steps; memory beyond the idle process, "
        "at its peak.",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16], help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step")
    add_model_sizes(parser, hidden=512)
    parser.add_argument(
        "--padded-tokens", type=int, default=0, help="tokens of (a)'s padded micro-batches; default: a group at once"
    )
    parser.add_argument("--one-by-one", action="store_true", help="no two contenders at a time but ours in its forms")
    parser.add_argument("--max-tokens", type=int, default=16384, help="token budget of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps that a cost comes from")
    parser.add_argument("--scales", action="store_true", help="only what scores of several tokens cost")
    parser.add_argument("--output", type=Path, help="write the result here as well")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.contender:
        work(args)
        return
    preamble = report.preamble(
        "One REAL training step beside peers' way",
        report.hardware(DEVICE),
        report.software("megatron-core", "transformers"),
        report.command("step"),
    )
    argv = []
    for name in ("prompts", "hidden", "ffn", "layers", "vocab", "heads", "kv_heads", "head_dim"):
        argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    argv += ["--max-tokens", str(args.max_tokens), "--padded-tokens", str(args.padded_tokens)]
    peak_flops = gemm_flops()
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(model_config(args), dtype=DTYPE)
        model.save_pretrained(scratch)
        size = sum(p.numel() for p in model.parameters())
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # the contenders need the memory that this process would keep
        results: dict[int, dict[str, dict[str, float]]] = {}
        for k in args.k:
            results[k] = measure(k, Path(scratch), args, argv)
            report.save(page(results, size, peak_flops, args, preamble), args.output)
    report.publish(page(results, size, peak_flops, args, preamble), args.output)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
