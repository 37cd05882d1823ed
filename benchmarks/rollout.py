"""Throughput of the SGLang engine's client beside SGLang's own benchmark client on the same server, in one run.

    python -m benchmarks.rollout [--sglang-python PYTHON] [--output benchmarks/results/rollout_cpu.md]

Starts one server (on the CPU: a random Qwen3 of about 1M parameters; with --model and --device cuda any checkpoint) and
drives it in turns: engine, `sglang.bench_serving`, engine, … with equal loads: as many requests, of one sample each,
prompts from the same rule, output lengths fixed, log-probs returned, the same concurrency, no streaming. The ratio is
taken pair by pair, so that other load on the machine meets both. A last row has the engine's usual load, K samples a
prompt, which the benchmark client cannot read.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from benchmarks import report
from real_megatron.config import RolloutConfig
from real_megatron.rollout.engine import EngineSpec, SamplingParams
from real_megatron.rollout.remote.process import LAUNCHER
from real_megatron.rollout.sglang.engine import SGLangEngine

VOCABULARY = 512


def write_model(directory: Path) -> None:
    """A random model without an end of sequence, so that both clients get outputs of full length."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def prompts_of(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """The rule of bench_serving's `random-ids`: consecutive ids from a random start."""
    rng = random.Random(seed)
    starts = [rng.randrange(vocabulary) + i for i in range(count)]
    return [[(start + j) % vocabulary for j in range(length)] for start in starts]


def drive_engine(engine: SGLangEngine, args: argparse.Namespace, samples: int, seed: int) -> float:
    """Output tokens per second of the engine; `args.prompts` responses in all."""
    prompts = prompts_of(args.prompts // samples, args.prompt_tokens, args.vocabulary, seed)
    params = SamplingParams(n=samples, max_new_tokens=args.output_tokens)
    start = time.perf_counter()
    groups = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    tokens = sum(len(response.token_ids) for group in groups for response in group)
    expected = len(prompts) * samples * args.output_tokens
    if tokens != expected:
        raise RuntimeError(f"{tokens} output tokens instead of {expected}: does the model end sequences?")
    return tokens / seconds


def drive_benchmark(args: argparse.Namespace, engine: SGLangEngine, model: Path, seed: int) -> float:
    """Output tokens per second that `sglang.bench_serving` reports for its own load on the engine's server."""
    url = engine.urls[0]
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.jsonl"
        code = "import runpy, sys; runpy.run_module('sglang.bench_serving', run_name='__main__', alter_sys=True)"
        if args.device == "cpu":
            # `datasets` is for loads that are not used here; the CPU environment does without.
            shim = f"sys.path.insert(0, {str(LAUNCHER.parent)!r}); import sglang_cpu_shim; "
            shim += "sys.modules['datasets'] = types.SimpleNamespace(load_dataset=None); "
            code = "import sys, types; " + shim + code
        command = [args.sglang_python, "-c", code, "--backend", "sglang", "--base-url", url]
        command += ["--model", str(model), "--tokenizer", str(model), "--dataset-name", "random-ids"]
        command += ["--tokenize-prompt", "--num-prompts", str(args.prompts), "--seed", str(seed)]
        command += ["--random-input-len", str(args.prompt_tokens), "--random-output-len", str(args.output_tokens)]
        command += ["--random-range-ratio", "1.0", "--max-concurrency", str(args.concurrency)]
        command += ["--disable-stream", "--return-logprob", "--temperature", "1.0", "--warmup-requests", "0"]
        command += ["--disable-tqdm", "--output-file", str(results)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": engine.api_key}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        if done.returncode or not results.exists():
            raise RuntimeError(f"bench_serving failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        result = json.loads(results.read_text(encoding="utf-8").splitlines()[-1])
    if result["total_output_tokens"] != args.prompts * args.output_tokens:
        raise RuntimeError(f"bench_serving got {result['total_output_tokens']} output tokens")
    return result["output_throughput"]


def measure(engine: SGLangEngine, args: argparse.Namespace, model: Path) -> dict[str, list[float]]:
    """Tokens per second of each turn. Each load begins with an empty prefix cache."""

    def flushed(seed: int) -> int:
        headers = {"Authorization": f"Bearer {engine.api_key}"}
        request = urllib.request.Request(engine.urls[0] + "/flush_cache", headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=60):
            return seed

    rates: dict[str, list[float]] = {"engine": [], "benchmark": [], "samples": []}
    drive_engine(engine, args, 1, flushed(99))
    for turn in range(args.turns):
        load = os.getloadavg()[0]
        order = ["engine", "benchmark"] if turn % 2 == 0 else ["benchmark", "engine"]
        for client in order:
            seed = flushed(turn)
            if client == "engine":
                rates["engine"].append(drive_engine(engine, args, 1, seed))
            else:
                rates["benchmark"].append(drive_benchmark(args, engine, model, seed))
        rates["samples"].append(drive_engine(engine, args, args.samples, flushed(turn)))
        shown = "  ".join(f"{name} {values[-1]:.0f} tokens/s" for name, values in rates.items())
        print(f"turn {turn + 1} of {args.turns}, load {load:.1f} before it: {shown}", flush=True)
    return rates


def page(args: argparse.Namespace, rates: dict[str, list[float]], preamble: list[str]) -> list[str]:
    """The lines of the result page."""
    ratios = [a / b for a, b in zip(rates["engine"], rates["benchmark"], strict=True)]

    def row(name: str, values: list[float]) -> list[str]:
        return [name, f"{statistics.median(values):,.0f}", f"{min(values):,.0f} – {max(values):,.0f}"]

    rows = [
        row("SGLangEngine, 1 sample a request", rates["engine"]),
        row("`sglang.bench_serving`, 1 sample a request", rates["benchmark"]),
        row(f"SGLangEngine, {args.samples} samples a request", rates["samples"]),
    ]
    model = args.model or "a random Qwen3 of 0.8M parameters (4 layers, hidden size 128)"
    return [
        *preamble,
        "",
        f"The same SGLang server on device {args.device}, in turns; server and client share the cores. Model: {model}. "
        f"Each load: {args.prompts} responses of {args.output_tokens} tokens to prompts of {args.prompt_tokens} "
        f"tokens, {args.concurrency} requests in flight, log-probs returned.",
        "",
        *report.table(["Client", "Output tokens/s, median", "Range"], rows),
        "",
        f"Ratio engine / bench_serving over {len(ratios)} pairs: median **{statistics.median(ratios):.2f}**, "
        f"range {min(ratios):.2f} – {max(ratios):.2f}.",
    ]


def sglang_version(python: str) -> str:
    """The version of SGLang in another Python's environment."""
    code = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, encoding="utf-8", errors="replace", check=True
    ).stdout.strip()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", default=".venv-sglang/bin/python", help="Python that has SGLang")
    parser.add_argument("--model", type=Path, help="checkpoint to serve instead of a small random one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=256, help="responses per load")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="K of the last row")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file for the result")
    return parser.parse_args(arguments)


def start_engine(args: argparse.Namespace, model: Path, work: Path) -> SGLangEngine:
    """An engine with one local server of the checkpoint."""
    spec = EngineSpec(
        config=RolloutConfig(engine="sglang", python=args.sglang_python, n=args.samples, concurrency=args.concurrency),
        model_dir=model,
        tokenizer=AutoTokenizer.from_pretrained(model),
        work_dir=work,
        max_prompt_tokens=args.prompt_tokens,
        max_response_tokens=args.output_tokens,
        device=torch.device(args.device),
        dtype=torch.float32 if args.device == "cpu" else torch.bfloat16,
        serve_loaded=True,
    )
    return SGLangEngine(spec)


def main() -> None:
    args = parse()
    preamble = report.preamble(
        "Rollout client: throughput beside SGLang's own benchmark client",
        report.hardware(args.device),
        f"{report.software('transformers')}, SGLang {sglang_version(args.sglang_python)}",
        report.command("rollout", hidden={"--sglang-python": "PYTHON"}),
    )
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or Path(directory) / "model"
        if args.model is None:
            write_model(model)
        args.vocabulary = AutoConfig.from_pretrained(model).vocab_size
        engine = start_engine(args, model, Path(directory))
        try:
            rates = measure(engine, args, model)
        finally:
            engine.close()
    report.publish(page(args, rates, preamble), args.output)


if __name__ == "__main__":
    main()
