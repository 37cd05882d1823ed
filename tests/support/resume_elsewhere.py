"""A training run that one environment has begun goes on in another, with another Python, torch and Megatron-Core.

    PYTHON -m tests.support.resume_elsewhere OTHER_PYTHON

Runs three steps of the tiny judge with PYTHON; then again, stopped in step 2 and resumed by the other, both ways round,
and compares the rows of metrics. tests/compat.sh calls it with its own Python and that of .venv.
"""

import argparse
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from real_megatron.policy.megatron_versions import INSTALLED
from tests.support.tiny_runs import rows, tiny_config, train, train_until, write_tiny_task

STEP = 2
TOLERANCE = 1e-4
"""Relative: another torch sums in another order, and sampled responses must stay the same."""


def versions() -> str:
    """Those of this environment."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Megatron-Core": INSTALLED,
        "transformers": transformers.__version__,
    }
    return ", ".join(f"{name} {version}" for name, version in found.items())


def start(python: str, task: Path, output: Path, *options: str) -> str:
    """One start of the run, in a process of its own. Returns its last line; raises RuntimeError with its errors."""
    command = [python, "-W", "ignore", "-m", "tests.support.resume_elsewhere", python]
    command += ["--task", str(task), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()[-1]


def differences(found: list[dict[str, float]], expected: list[dict[str, float]]) -> list[str]:
    """Where two lists of rows differ by more than rounding."""
    if [row.keys() for row in found] != [row.keys() for row in expected]:
        return [f"{len(found)} rows instead of {len(expected)}, or other keys"]
    return [
        f"row {index}, {name}: {found[index][name]} instead of {value}"
        for index, row in enumerate(expected)
        for name, value in row.items()
        if found[index][name] != value
        and not math.isclose(found[index][name], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    ]


def compare(other: str) -> bool:
    """Print what each order gave; whether both went on as the run that was not stopped."""
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        task = write_tiny_task(Path(scratch, "task"))
        whole = Path(scratch, "whole")
        print(f"not stopped: {start(sys.executable, task, whole)}")
        for name, first, second in [("there", sys.executable, other), ("back", other, sys.executable)]:
            output = Path(scratch, name)
            begun = start(first, task, output, "--stop")
            try:
                resumed = start(second, task, output)
            except RuntimeError as error:
                message = str(error).strip().splitlines()[-1]
                print(f"begun with {begun}, refused by {second}: {message}")
                good &= "0.19 or newer has written it" in message
                continue
            faults = differences(rows(output), rows(whole))
            print(f"begun with {begun}, resumed with {resumed}: {'; '.join(faults) or 'the same rows'}")
            good &= not faults
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="Python of the other environment")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.output:
        return 0 if compare(args.other) else 1
    config = tiny_config(args.task, args.output)
    if args.stop:
        train_until(config, STEP)
    else:
        train(config)
    print(versions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
