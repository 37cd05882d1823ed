"""Weak scaling of REAL training steps: a fixed amount of work a rank, on 1, 2, … ranks of one machine.

    python -m benchmarks.scaling --ranks 1 2 [--output benchmarks/results/scaling_cpu.md]

Starts torchrun for each number of ranks. All train the same random Qwen3 with `Policy.train_step`, data-parallel, or
tensor-parallel with `--tensor`; the groups of one rank are repeated on every other, so that no rank waits for another's
longer ones. Without a GPU the ranks are gloo's and have one thread each. Efficiency is the tokens/s of a rank beside
those of the smallest number of ranks. Beside it stands what `planning.update_time` projects, where the GPU is in the
table of `real_megatron.hardware`, and on any GPU the most that torch's allocator held beside what planning says of it.
Qwen3-0.6B:

    python -m benchmarks.scaling --ranks 1 2 4 8 --prompts 4 --hidden 1024 --ffn 3072 --layers 28 --vocab 151936 \
        --heads 16 --kv-heads 8 --head-dim 128 --tied --output FILE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import report
from benchmarks.measure import synchronize
from benchmarks.step_contenders import (
    DEVICE,
    DTYPE,
    SCORES,
    TOKENS_PER_WORD,
    add_model_sizes,
    make_groups,
    model_config,
)
from real_megatron.batch.types import Group
from real_megatron.bridge import describe
from real_megatron.config import RunConfig
from real_megatron.hardware import GPUS, Gpu, peak_flops
from real_megatron.objective import build_objective
from real_megatron.planning.activations import activation_bytes
from real_megatron.planning.saved_tensors import CPU, GPU, MicrobatchSize
from real_megatron.planning.states import state_bytes
from real_megatron.planning.update_time import update_time
from real_megatron.planning.workload import Layout, Workload
from real_megatron.policy.parallel_groups import no_transformer_engine
from real_megatron.policy.policy import Policy

ROOT = Path(__file__).parents[1]
SIZES = ("hidden", "ffn", "layers", "vocab", "heads", "kv_heads", "head_dim", "prompts", "k", "steps", "max_tokens")


def run_config(args: argparse.Namespace, checkpoint: str) -> RunConfig:
    parallel = {"tensor": args.tensor, "sequence_parallel": args.tensor > 1}
    batch = {"max_tokens": args.max_tokens, "prompts": args.prompts}
    return RunConfig.model_validate({"model": {"path": checkpoint}, "parallel": parallel, "batch": batch})


def work(args: argparse.Namespace) -> None:
    """A rank: one step that warms up, then those that are timed; rank 0 prints a line of JSON."""
    config = run_config(args, args.checkpoint)
    policy = Policy(config, SCORES, [1.0, 2.0, 3.0, 4.0, 5.0], total_updates=10_000)
    objective = build_objective(config.objective, config.scale.probabilities)
    groups = make_groups(args.k, args.prompts, args.vocab) * policy.runtime.data_size
    seconds, tokens = [], 0.0
    for step in range(args.steps + 1):
        synchronize(DEVICE)
        dist.barrier()
        started = time.perf_counter()
        tokens = policy.train_step(groups, objective)["tokens"]
        synchronize(DEVICE)
        dist.barrier()
        if step:
            seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        result = {"seconds": seconds, "tokens": tokens, "planned": planned_bytes(policy, groups)}
        if DEVICE == "cuda":
            result["peak"] = torch.cuda.max_memory_allocated()
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def planned_bytes(policy: Policy, groups: list[Group]) -> float:
    """What planning says of this rank's states and activations in a step on these groups."""
    parallel = policy.config.parallel
    model = policy.config.model.model_copy(update={"dtype": str(DTYPE).removeprefix("torch.")})
    layout = Layout(policy.description, parallel, model, policy.runtime.world_size)
    batches = policy.planner.plan(groups).microbatches
    longest = max(batches, key=lambda batch: batch.tokens.numel())
    size = MicrobatchSize(longest.tokens.numel(), longest.row_positions.numel())
    kernels = replace(GPU, transformer_engine=not no_transformer_engine()) if DEVICE == "cuda" else CPU
    return state_bytes(layout, 0).total + activation_bytes(layout, 0, size, len(batches), kernels).total


def measure(ranks: int, args: argparse.Namespace, checkpoint: str) -> dict:
    """The seconds of the timed steps on so many ranks, the tokens of one, and the machine's load average after them."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.scaling", "--checkpoint", checkpoint]
    for name in (*SIZES, "tensor"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if DEVICE == "cpu" else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1]) | {"load": os.getloadavg()[0]}


def gpu_here() -> Gpu | None:
    """The table's GPU that this machine has; None for others, on which nothing is projected."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    known = [gpu for gpu in GPUS.values() if gpu.name in name and peak_flops(name) == gpu.flops]
    return max(known, key=lambda gpu: len(gpu.name), default=None)


def projected(ranks: int, args: argparse.Namespace, checkpoint: str, gpu: Gpu) -> float:
    """Seconds that an update of the same groups should take."""
    config = run_config(args, checkpoint)
    layout = Layout(describe(AutoConfig.from_pretrained(checkpoint)), config.parallel, config.model, ranks)
    groups = make_groups(args.k, args.prompts, args.vocab)
    responses = [len(t.response_ids) for group in groups for t in group.trajectories]
    prompt = statistics.mean(len(group.prompt_ids) for group in groups)
    workload = Workload(
        prompts=args.prompts * layout.data,
        responses=args.k,
        prompt_tokens=prompt,
        response_tokens=statistics.mean(responses),
        max_prompt_tokens=round(prompt),
        max_response_tokens=max(responses),
        max_tokens=args.max_tokens,
        generates=False,
    )
    return sum(update_time(layout, workload, gpu)[0].values())


def page(rows: dict[int, dict], args: argparse.Namespace, checkpoint: str, size: int, preamble: list[str]) -> list[str]:
    """The lines of the result page."""
    gpu = gpu_here()
    first = min(rows)
    rates = {ranks: row["tokens"] / min(row["seconds"]) / ranks for ranks, row in rows.items()}
    seconds = {ranks: projected(ranks, args, checkpoint, gpu) for ranks in rows} if gpu else {}
    table = []
    for ranks, row in rows.items():
        times = row["seconds"]
        cells: list[object] = [ranks, f"{min(times):.2f}", f"{max(times):.2f}", f"{row['tokens']:,.0f}"]
        cells += [f"{rates[ranks] * ranks:,.0f}", f"{rates[ranks] / rates[first]:.2f}"]
        cells += [f"{seconds[ranks]:.2f}", f"{seconds[first] / seconds[ranks]:.2f}"] if gpu else ["–", "–"]
        cells.append(f"{row['load']:.1f}")
        if "peak" in row:
            cells += [f"{row[key] / 2**30:.2f}" for key in ("peak", "planned")]
        table.append(cells)
    header = ["ranks", "seconds, fastest", "slowest", "tokens a step", "tokens/s", "efficiency"]
    header += ["projected seconds", "projected efficiency", "load average after"]
    header += ["peak GiB of rank 0", "planned"] if "peak" in rows[first] else []
    return [
        *preamble,
        f"- Model: random Qwen3, {size / 1e6:.1f}M parameters (hidden {args.hidden}, {args.layers} layers, vocabulary "
        f"{args.vocab}), {str(DTYPE).removeprefix('torch.')}; tensor parallel {args.tensor}, the rest data-parallel",
        f"- Work: {args.prompts} prompts a data-parallel rank, {args.k} responses each; lengths of Vicuna Bench, "
        f"{TOKENS_PER_WORD} tokens a word; {args.steps} steps after one that warms up",
        f"- Ranks: {'NCCL, a GPU each' if DEVICE == 'cuda' else 'gloo, a thread each; a result of a CPU, not of GPUs'}",
        "",
        *report.table(header, table, left=0),
        "",
        "Efficiency: tokens/s of a rank over those of the smallest number of ranks, both from the fastest step. "
        "Nothing is projected for other hardware than the GPUs of `real_megatron/hardware.py`.",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, one run each")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--k", type=int, default=8, help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per step and data-parallel rank")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    add_model_sizes(parser, hidden=256)
    parser.add_argument("--max-tokens", type=int, default=16384, help="token budget of a micro-batch")
    parser.add_argument("--output", type=Path, help="write the result here as well")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.checkpoint:
        work(args)
        return
    preamble = report.preamble(
        "Weak scaling of REAL training steps",
        report.hardware(DEVICE),
        report.software("megatron-core", "transformers"),
        report.command("scaling"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(args), dtype=DTYPE)
        model.save_pretrained(scratch)
        size = sum(p.numel() for p in model.parameters())
        del model
        rows: dict[int, dict] = {}
        for ranks in sorted(args.ranks):
            rows[ranks] = measure(ranks, args, scratch)
            report.save(page(rows, args, scratch, size, preamble), args.output)
        report.publish(page(rows, args, scratch, size, preamble), args.output)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
