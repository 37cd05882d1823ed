"""Peak memory and throughput of both conversions on a random model of several GB, beside `cp` of the same files.

    python -m benchmarks.convert --work DIR [--gigabytes 4.2] [--output benchmarks/results/convert_cpu.md]

Writes a random Qwen2.5-3B-like checkpoint, converts it to Megatron and back with `real-megatron convert`, checks that
all tensors are bit-identical, and deletes the files. Needs four times the model's size on disk.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config

from benchmarks import report
from benchmarks.measure import run_command
from real_megatron.bridge import describe, parameter_count, parameters
from real_megatron.bridge.hf_writer import SafetensorsStream, plan_files, write_index
from real_megatron.hf.checkpoint import HFCheckpoint


@dataclass
class Measurement:
    """One command: seconds, and the peak over time of the resident memory of all its processes together, in bytes."""

    label: str
    seconds: float
    peak: int


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
    files = plan_files(table, [torch.bfloat16] * len(table), 10**9)
    generator = torch.Generator().manual_seed(0)
    for file in files:
        stream = SafetensorsStream(directory, file)
        for _, shape, _ in file.tensors():
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            stream.write(bits.view(torch.bfloat16))
        stream.close()
    write_index(directory, files)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def measure(label: str, command: list[str]) -> Measurement:
    """Run a command and measure it."""
    return Measurement(label, *run_command(command))


def compare(first: Path, second: Path) -> int:
    """Number of tensors, all of which are bit-identical; raises AssertionError otherwise."""
    a, b = HFCheckpoint(first), HFCheckpoint(second)
    assert a.entries.keys() == b.entries.keys(), "tensor names differ"
    for name in a.entries:
        # As integers: random bits contain NaN.
        assert torch.equal(a.tensor(name).view(torch.int16), b.tensor(name).view(torch.int16)), name
    return len(a.entries)


def page(
    results: list[Measurement], size: int, count: int, tensors: int, tensor: int, preamble: list[str]
) -> list[str]:
    """The lines of the result page."""
    rows = []
    for result in results:
        speed = size / 1e6 / result.seconds
        rows.append([result.label, f"{result.seconds:.1f}", f"{speed:.0f}", f"{result.peak / 2**30:.2f} GiB"])
    return [
        *preamble,
        "",
        f"A random Qwen2.5-3B-like model of {count:,} parameters in bfloat16, {size / 1e9:.2f} GB. Hugging Face → "
        f"Megatron (`--tensor {tensor}`) → Hugging Face: all {tensors} tensors bit-identical.",
        "",
        *report.table(["Run", "Seconds", "MB/s", "Peak resident memory"], rows),
        "",
        "Memory is the sum of the resident sizes of all processes of a run, the waiting parent included, sampled every "
        "20 ms; it counts Python and torch once per process, and the mapped pages of the files being read. Seconds are "
        "those of the whole command, imports included. Every run, `cp` too, ends with the data flushed to disk; the "
        "source is in the page cache where it fits. `cp` is the baseline: it shows what the same disk does in the same "
        "minutes.",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="empty or new directory for the files")
    parser.add_argument("--gigabytes", type=float, default=4.2, help="size of the model's weights (default 4.2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="process counts to run with")
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel size to convert for (default 2)")
    parser.add_argument("--output", type=Path, help="file for the result page; default: print only")
    return parser.parse_args(arguments)


def run(config: Qwen2Config, work: Path, workers: list[int], tensor: int) -> tuple[list[Measurement], int, int]:
    """Write, copy and convert the model below `work`; measurements, bytes of the model, number of its tensors."""
    hf, megatron, back, copy = (work / name for name in ("hf", "megatron", "back", "copy"))
    convert = [sys.executable, "-m", "real_megatron", "convert"]
    tensors = 0
    try:
        size = write_random(hf, config)
        copying = f"cp -r '{hf}' '{copy}' && sync -f '{copy}'"
        results = [measure("`cp`", ["sh", "-c", copying])]
        shutil.rmtree(copy)
        for count in workers:
            label = f"{count} process" + ("es" if count > 1 else "")
            forward = [*convert, "to-megatron", str(hf), str(megatron), "--tensor", str(tensor)]
            results.append(measure(f"HF → Megatron, {label}", [*forward, "--workers", str(count)]))
            backward = [*convert, "to-hf", str(megatron), str(back), "--max-file-gb", "1"]
            results.append(measure(f"Megatron → HF, {label}", [*backward, "--workers", str(count)]))
            tensors = compare(hf, back)
            shutil.rmtree(megatron)
            shutil.rmtree(back)
    finally:
        for directory in (hf, megatron, back, copy):
            shutil.rmtree(directory, ignore_errors=True)
    return results, size, tensors


def main() -> None:
    args = parse()
    preamble = report.preamble(
        "Checkpoint conversion: memory and throughput",
        report.hardware("cpu"),
        report.software("megatron-core", "safetensors", "transformers"),
        report.command("convert", hidden={"--work": "DIR"}),
    )
    config = model_config(args.gigabytes)
    results, size, tensors = run(config, args.work, args.workers, args.tensor)
    count = parameter_count(describe(config))
    report.publish(page(results, size, count, tensors, args.tensor, preamble), args.output)


if __name__ == "__main__":
    main()
