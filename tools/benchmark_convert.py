"""Peak memory and throughput of both conversions on a random model of several GB, beside `cp` of the same files.

    python tools/benchmark_convert.py --work DIR [--gigabytes 4.2] [--output benchmarks/results/convert_cpu.md]

Writes a random Qwen2.5-3B-like checkpoint, converts it to Megatron and back with the command-line tools, checks that
all tensors are bit-identical, and cleans up. Needs four times the model's size on disk.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from transformers import Qwen2Config

from real_megatron.bridge import HFCheckpoint, describe, parameter_count, parameters
from real_megatron.bridge.hf_writer import SafetensorsStream, plan_shards, write_index

TOOLS = Path(__file__).parent


@dataclass
class Measurement:
    """One command: seconds, and the peak over time of the resident memory of all its processes together, in bytes."""

    label: str
    seconds: float
    rss: int


def model_config(gigabytes: float) -> Qwen2Config:
    """Qwen2.5-3B with as many layers as bfloat16 weights of that size have."""
    for layers in range(1, 200):
        config = Qwen2Config(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            dtype="bfloat16",
            architectures=["Qwen2ForCausalLM"],
        )
        if parameter_count(describe(config)) * 2 >= gigabytes * 1e9:
            return config
    raise ValueError(f"{gigabytes} GB is out of range")


def write_random(directory: Path, config: Qwen2Config) -> int:
    """Write a random checkpoint of the configuration; returns its bytes."""
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    table = parameters(describe(config))
    shards = plan_shards(table, [torch.bfloat16] * len(table), 10**9)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        stream = SafetensorsStream(directory, shard)
        for _, shape, _ in shard.tensors():
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            stream.write(bits.view(torch.bfloat16))
        stream.close()
    write_index(directory, shards)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure(label: str, command: list[str]) -> Measurement:
    """Run a command; sample the memory of its process tree every 20 ms."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    rss = 0
    while process.poll() is None:
        rss = max(rss, sum(_resident(p) for p in _tree(process.pid)))
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[0]}")
    return Measurement(label, time.monotonic() - start, rss)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def compare(first: Path, second: Path) -> int:
    """Number of tensors, all of which are bit-identical; raises AssertionError otherwise."""
    a, b = HFCheckpoint(first), HFCheckpoint(second)
    assert a.entries.keys() == b.entries.keys(), "tensor names differ"
    for name in a.entries:
        # As integers: random bits contain NaN.
        assert torch.equal(a.tensor(name).view(torch.int16), b.tensor(name).view(torch.int16)), name
    return len(a.entries)


def report(
    results: list[Measurement],
    size: int,
    count: int,
    tensors: int,
    tp: int,
    load: float,
    arguments: list[str],
) -> str:
    """The result page in Markdown."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    lines = [
        "# Checkpoint conversion: memory and throughput",
        "",
        f"A random Qwen2.5-3B-like model of {count:,} parameters in bfloat16, {size / 1e9:.2f} GB. Hugging Face → "
        f"Megatron (`--tp {tp}`) → Hugging Face: all {tensors} tensors bit-identical.",
        "",
        f"- Hardware: {cpu}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory; "
        f"load average before the runs {load:.1f}",
        f"- Software: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "safetensors", "transformers")),
        f"- Command: `python tools/benchmark_convert.py {' '.join(arguments)}`".rstrip(),
        "",
        "| Run | Seconds | MB/s | Peak resident memory |",
        "|---|---:|---:|---:|",
    ]
    for run in results:
        speed = size / 1e6 / run.seconds
        lines.append(f"| {run.label} | {run.seconds:.1f} | {speed:.0f} | {run.rss / 2**30:.2f} GiB |")
    lines += [
        "",
        "Memory is the sum of the resident sizes of all processes of a run, the waiting parent included, sampled every "
        "20 ms; it counts Python and torch once per process, and the mapped pages of the files being read. Seconds are "
        "those of the whole command, imports included. Every run, `cp` too, ends with the data flushed to disk; the "
        "source is in the page cache where it fits. `cp` is the yardstick of the same minutes on the same disk.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="empty or new directory for the files")
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="process counts to run with")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file for the result page; default: print only")
    args = parser.parse_args()
    hf, megatron, back, copy = (args.work / name for name in ("hf", "megatron", "back", "copy"))
    config = model_config(args.gigabytes)
    load = os.getloadavg()[0]
    try:
        size = write_random(hf, config)
        to_megatron = [sys.executable, str(TOOLS / "convert_hf_to_megatron.py"), "--hf-path", str(hf)]
        to_hf = [sys.executable, str(TOOLS / "convert_megatron_to_hf.py"), "--megatron-path", str(megatron)]
        copying = f"cp -r '{hf}' '{copy}' && sync -f '{copy}'"
        results = [measure("`cp`", ["sh", "-c", copying])]
        shutil.rmtree(copy)
        for count in args.workers:
            label = f"{count} process" + ("es" if count > 1 else "")
            workers = ["--workers", str(count)]
            forward = [*to_megatron, "--output", str(megatron), "--tp", str(args.tp), *workers]
            results.append(measure(f"HF → Megatron, {label}", forward))
            backward = [*to_hf, "--output", str(back), "--max-shard-gb", "1", *workers]
            results.append(measure(f"Megatron → HF, {label}", backward))
            tensors = compare(hf, back)
            shutil.rmtree(megatron)
            shutil.rmtree(back)
    finally:
        for directory in (hf, megatron, back, copy):
            shutil.rmtree(directory, ignore_errors=True)
    shown = [a for a in sys.argv[1:] if not a.startswith(str(args.work))]
    shown = [("--work DIR" if a == "--work" else a) for a in shown]
    page = report(results, size, parameter_count(describe(config)), tensors, args.tp, load, shown)
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
