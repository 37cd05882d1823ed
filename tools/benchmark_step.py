"""One REAL training step beside what peers run, on the lengths of a real judge benchmark, in one run.

    python tools/benchmark_step.py [--k 4 8 16] [--output benchmarks/results/step_cpu.md]

Contenders, all on the same random model, the same groups and the same objective:

    ours       shared prompts, one forward pass, response-only linear head (this package's step)
    (b)        Megatron per-sequence packing: this package's step with share_prompt off
    (a)        transformers as peers run it: the K responses of a prompt as K padded sequences; a scoring pass (rewards,
               old log-probs), then the update; full logits and log_softmax; torch's AdamW
    binary     ours with a binary-reward RLOO objective: what the reward costs

Each contender runs in a process of its own, so that peak memory is its own, and takes turns with the others. Before the
clock starts, the gradients of ours and (b) are compared with those of (a). The reward costs little beside a step's
noise: ours and binary alternate for `--pairs` more steps each, and the median of their ratios is given.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from real_megatron.batch.packing import layout_of, rows_of, tokens_of
from real_megatron.batch.types import Group, Trajectory
from real_megatron.bridge import describe
from real_megatron.config import RunConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective
from real_megatron.policy import flops
from real_megatron.policy.policy import Policy

LENGTHS = Path(__file__).parent.parent / "benchmarks" / "lengths" / "vicuna_bench.json"
TOKENS_PER_WORD = 1.35
SCORE_IDS = [16, 17, 18, 19, 20]
CONTENDERS = ("a", "b", "ours", "binary")


def model_config(args: argparse.Namespace) -> Qwen3Config:
    """A Qwen3 of the asked size; by default output head and attention take about the share that they have in
    Qwen3-0.6B: a quarter of the weight products each."""
    return Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 256, 1),
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def make_groups(k: int, prompts: int, vocab: int, seed: int = 0) -> list[Group]:
    """Groups with the benchmark's prompt and critique lengths and random tokens; old log-probs are placeholders."""
    lengths = json.loads(LENGTHS.read_text())
    rng = random.Random(seed)
    critiques = [words for row in lengths["critique_words"] for words in row]
    groups = []
    for words in rng.sample(lengths["prompt_words"], prompts):
        prompt = [rng.randrange(vocab) for _ in range(round(words * TOKENS_PER_WORD))]
        trajectories = []
        for _ in range(k):
            length = round(rng.choice(critiques) * TOKENS_PER_WORD)
            trajectories.append(Trajectory([rng.randrange(vocab) for _ in range(length)], length - 1))
        groups.append(Group(prompt, trajectories, label=float(rng.randint(1, 5))))
    return groups


class MegatronStep:
    """This package's training step."""

    def __init__(self, checkpoint: Path, args: argparse.Namespace, share_prompt: bool, objective: str) -> None:
        config = RunConfig.model_validate(
            {
                "model": {"path": str(checkpoint)},
                "optimizer": {"lr": 1e-6, "clip_grad": 0.0},
                "batch": {"max_tokens": args.max_tokens, "share_prompt": share_prompt},
                "objective": {"name": objective},
            }
        )
        self.policy = Policy(config, SCORE_IDS, [1.0, 2.0, 3.0, 4.0, 5.0], updates=10_000)
        self.objective = build_objective(config.objective)

    def step(self, groups: list[Group]) -> dict[str, float]:
        return self.policy.train_step(groups, self.objective)

    def gradients(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        """Gradients under their Hugging Face names: the weights' own way out, with gradients in their place."""
        self.step(groups)
        parameters = [p for chunk in self.policy.chunks for p in chunk.parameters()]
        weights = [p.data for p in parameters]
        for p in parameters:
            p.data = p.main_grad.to(p.dtype)
        gradients = {name: tensor.clone() for name, tensor in self.policy.export()}
        for p, data in zip(parameters, weights, strict=True):
            p.data = data
        return gradients


class TransformersStep:
    """The step as peers run it, in plain transformers and torch."""

    def __init__(self, checkpoint: Path, args: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1)
        self.objective = build_objective(RunConfig().objective)

    def step(self, groups: list[Group]) -> dict[str, float]:
        loss = self._backward(groups)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss}

    def gradients(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        self._backward(groups)
        return {name: p.grad for name, p in self.model.named_parameters()}

    def _backward(self, groups: list[Group]) -> float:
        totals = Totals(len(groups), sum(len(g.trajectories) for g in groups), sum(rows_of(g) for g in groups))
        total = 0.0
        with torch.no_grad():
            advantages = []
            for group in groups:
                scored = self._scored(group)
                advantages.append(self.objective.advantages(self.objective.rewards(scored), scored.group))
        for group, advantage in zip(groups, advantages, strict=True):
            scored = self._scored(group)
            scored.advantages = advantage
            loss, _ = self.objective(scored, totals)
            loss.backward()
            total += float(loss)
        return total

    def _scored(self, group: Group) -> ScoredBatch:
        """The group's K sequences padded to the longest. Causal attention makes padding at the end harmless."""
        sequences = [torch.tensor(group.prompt_ids + t.response_ids) for t in group.trajectories]
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        logprobs = self.model(tokens, use_cache=False).logits.float().log_softmax(-1)
        chosen = logprobs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        start = len(group.prompt_ids) - 1
        per_response = [chosen[i, start : start + len(t.response_ids)] for i, t in enumerate(group.trajectories)]
        last = torch.tensor([len(s) - 1 for s in sequences], device=self.device)
        count = len(group.trajectories)
        index = torch.repeat_interleave(torch.arange(count), torch.tensor([len(x) for x in per_response]))
        return ScoredBatch(
            token_logprobs=torch.cat(per_response),
            token_trajectory=index.to(self.device),
            score_logprobs=logprobs[torch.arange(count, device=self.device), last][:, SCORE_IDS],
            has_answer=torch.ones(count, dtype=torch.bool, device=self.device),
            labels=torch.full((count,), group.label, device=self.device),
            group=torch.zeros(count, dtype=torch.long, device=self.device),
            values=torch.arange(1.0, 6.0, device=self.device),
        )


def build(contender: str, checkpoint: Path, args: argparse.Namespace) -> MegatronStep | TransformersStep:
    if contender == "a":
        return TransformersStep(checkpoint, args)
    return MegatronStep(checkpoint, args, contender != "b", "rloo" if contender == "binary" else "real")


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(args: argparse.Namespace) -> None:
    """A contender's process: one JSON line in (`step`, `gradients FILE`, `quit`), one out."""
    groups = make_groups(args.k[0], args.prompts, args.vocab)
    contender = build(args.contender, Path(args.checkpoint), args)
    before = peak_bytes()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command, _, target = line.strip().partition(" ")
        if command == "gradients":
            torch.save(contender.gradients(groups), target)
            print(json.dumps({"done": True}), flush=True)
        elif command == "step":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            metrics = contender.step(groups)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            print(json.dumps({"seconds": seconds, "peak": peak_bytes() - before, "loss": metrics["loss"]}), flush=True)
        else:
            return


class Contender:
    """A contender's process, seen from the benchmark."""

    def __init__(self, name: str, checkpoint: Path, k: int, argv: list[str]) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *argv]
        command += ["--contender", name, "--checkpoint", str(checkpoint), "--k", str(k)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.read()

    def read(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(self.process.stderr.read())

    def ask(self, command: str) -> dict[str, float]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def largest_difference(found: Path, expected: Path) -> float:
    """Largest ‖Δ‖ / ‖g‖ over the tensors of two gradient files."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (found, expected))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].double() - theirs[n].double()).norm() / theirs[n].double().norm()) for n in theirs)


def reward_cost(ours: Contender, binary: Contender, pairs: int) -> float:
    """Median ratio of the seconds of a REAL step and of a binary-reward step right before or after it."""
    ratios = []
    for turn in range(pairs):
        first, second = (ours, binary) if turn % 2 == 0 else (binary, ours)
        seconds = {id(contender): contender.ask("step")["seconds"] for contender in (first, second)}
        ratios.append(seconds[id(ours)] / seconds[id(binary)])
    return statistics.median(ratios)


def measure(k: int, checkpoint: Path, args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, float]]:
    """Interleaved steps of all contenders at one K: fastest time, peak memory of a step, gradient difference of
    (b) and ours, and for ours the reward's cost."""
    results: dict[str, dict[str, float]] = {name: {"seconds": float("inf")} for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("a", "b", "ours"):
            contender = Contender(name, checkpoint, k, argv)
            contender.ask(f"gradients {scratch}/{name}")
            contender.close()
        for name in ("b", "ours"):
            results[name]["difference"] = largest_difference(Path(scratch, name), Path(scratch, "a"))
    contenders = {name: Contender(name, checkpoint, k, argv) for name in CONTENDERS}
    for _ in range(args.repeats):
        for name, contender in contenders.items():
            answer = contender.ask("step")
            results[name]["seconds"] = min(results[name]["seconds"], answer["seconds"])
            results[name]["peak"] = answer["peak"]
    results["ours"]["reward_cost"] = reward_cost(contenders["ours"], contenders["binary"], args.pairs)
    for contender in contenders.values():
        contender.close()
    return results


def table(results: dict[int, dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    description = describe(model_config(args))
    lines = [
        "| K | step | seconds | ours is faster by | peak memory of a step, MiB | ours needs | gradients, "
        "rel. difference to (a) | tokens through the model | model TFLOP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k, rows in results.items():
        groups = make_groups(k, args.prompts, args.vocab)
        shared = sum(tokens_of(g) for g in groups)
        separate = sum(tokens_of(g, share_prompt=False) for g in groups)
        work = sum(flops.training_flops(description, layout_of(g), rows_of(g)) for g in groups)
        tokens = {"a": 2 * separate, "b": separate, "ours": shared, "binary": shared}
        labels = {
            "a": "(a) transformers, scoring pass + update",
            "b": "(b) Megatron, prompts not shared",
            "ours": "**ours**",
            "binary": "ours, binary-reward RLOO",
        }
        ours = rows["ours"]
        for name in CONTENDERS:
            row = rows[name]
            difference = f"{row['difference']:.1e}" if "difference" in row else "–"
            lines.append(
                f"| {k} | {labels[name]} | {row['seconds']:.3f} | {row['seconds'] / ours['seconds']:.2f}× | "
                f"{row['peak'] / 2**20:.0f} | {ours['peak'] / row['peak']:.2f}× | {difference} | "
                f"{tokens[name]:,} | {work / 1e12:.3f} |"
            )
    costs = ", ".join(f"{rows['ours']['reward_cost']:.3f} at K = {k}" for k, rows in results.items())
    lines += [
        "",
        f"A REAL step takes, of a binary-reward RLOO step of the same batch (median of {args.pairs} pairs): {costs}.",
    ]
    return "\n".join(lines)


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16], help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=16384, help="token budget of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps that the reward's cost comes from")
    parser.add_argument("--output", type=Path, help="write the result here as well")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        work(args)
        return
    load = os.getloadavg()[0]
    argv = []
    for name in ("prompts", "hidden", "ffn", "layers", "vocab", "max_tokens"):
        argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(args), dtype=torch.float32)
        model.save_pretrained(scratch)
        size = sum(p.numel() for p in model.parameters())
        del model
        results = {k: measure(k, Path(scratch), args, argv) for k in args.k}
    text = "\n".join(
        [
            "# One REAL training step beside peers' way",
            "",
            f"Hardware: {hardware()}. torch {torch.__version__}, megatron-core {version('megatron-core')}, "
            f"transformers {version('transformers')}, Python {platform.python_version()}.",
            f"Model: random Qwen3, {size / 1e6:.1f}M parameters (hidden {args.hidden}, {args.layers} layers, vocabulary"
            f" {args.vocab}), {'bfloat16' if torch.cuda.is_available() else 'float32'}; {args.prompts} prompts a step.",
            "Lengths: Vicuna Bench in Prometheus format (benchmarks/lengths/vicuna_bench.json), "
            f"{TOKENS_PER_WORD} tokens a word.",
            f"Load average before the run: {load:.1f}.",
            f"Command: `python tools/benchmark_step.py {' '.join(sys.argv[1:])}`".rstrip(),
            "",
            table(results, args),
            "",
            f"Fastest of {args.repeats} interleaved steps; memory beyond the idle process, at its peak.",
            "",
        ]
    )
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
