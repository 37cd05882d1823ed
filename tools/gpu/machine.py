"""The lines of tools/gpu_acceptance.sh's summary that say what it ran on. Fails where the GPU or a package is missing.

python tools/gpu/machine.py FILE [--dry]
"""

import argparse
import importlib
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "megatron-core", "liger-kernel", "transformer-engine")
MODULES = ("real_megatron.cli", "real_megatron.training.rl", "real_megatron.policy.policy", "benchmarks.head")


def output_of(*command: str) -> str:
    """First line of what a command prints; empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true", help="no GPU is asked for")
    options = parser.parse_args()
    card = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    commit = output_of("git", "rev-parse", "HEAD") or "unknown"
    changed = " with changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    lines = [
        f"- Card: {card or 'none'}; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        f"- Software: {versions()}; {'nvcc' if nvcc else 'no nvcc'}",
        f"- Commit: {commit}{changed}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    options.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    for module in MODULES:
        importlib.import_module(module)
    import torch

    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --dry runs everything at toy size on the CPU")


if __name__ == "__main__":
    main()
