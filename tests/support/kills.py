"""Training runs that are killed on their way, and what has to be true of them afterwards."""

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader

from real_megatron.config import RunConfig
from real_megatron.policy.megatron_versions import read_common_state
from tests.support.kill_points import below
from tests.support.kill_zygote import End, Start
from tests.support.tiny_runs import tiny_config

ROOT = Path(__file__).parents[2]


def killed_config(task: Path, output: Path, **sections: Any) -> RunConfig:
    """A run that does all that a run can do in each of its three steps: small, so that it starts and ends soon."""
    base: dict[str, Any] = {
        "steps": 3,
        "batch": {"prompts": 2, "max_tokens": 256},
        "rollout": {"n": 2},
        "data": {
            "eval": {"dev": {"path": str(task / "test_ood.jsonl"), "limit": 4}},
            "max_prompt_tokens": 32,
            "max_response_tokens": 8,
        },
        "evaluation": {"every": 1, "bootstrap": 5},
        "checkpoint": {"every": 1, "keep": 2, "save_hf": True},
        "metrics": {"tensorboard": True, "samples_every": 1},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    steps = base.pop("steps")
    data = {"train": [{"path": str(task / "train_rl.jsonl")}], **base.pop("data")}
    return tiny_config(task, output, steps=steps, data=data, **base)


class Zygote:
    """tests.support.kill_zygote as a child process, started once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, start: Start) -> End:
        """Start a run and wait until nothing of it is left."""
        process = self._process or self._begin()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asdict(start)) + "\n")
        process.stdin.flush()
        return End(**json.loads(process.stdout.readline()))

    def _begin(self) -> subprocess.Popen[str]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kill_zygote"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


ZYGOTE = Zygote()


@dataclass
class Run:
    """A run in a directory of its own, which also holds its configuration, its log and its scratch space."""

    directory: Path
    config: RunConfig
    ranks: int
    command: str = "train"
    setup: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.config.output

    @property
    def scratch(self) -> Path:
        """TMPDIR of the run."""
        return self.directory / "scratch"

    def start(self, kill: dict[str, Any] | None = None, ranks: Sequence[int] = (), watch: bool = False) -> End:
        """Run the command once; where told so, until it kills itself."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        file = self.directory / "run.yaml"
        file.write_text(self.config.to_yaml(), encoding="utf-8")
        return ZYGOTE.run(
            Start(
                [self.command, str(file)],
                self.ranks,
                str(self.directory / "log"),
                str(self.directory / "report"),
                kill or {},
                list(ranks),
                {"TMPDIR": str(self.scratch), **self.environment},
                self.setup,
                below(self.output) if watch else "",
            )
        )

    def finish(self) -> End:
        """Run the command to its end, undisturbed."""
        end = self.start()
        assert end.codes == [0] * self.ranks, f"{end}\n{self.log()[-6000:]}"
        return end

    def forget(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.directory)

    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8")

    def report(self, rank: int = 0) -> dict[str, Any]:
        """What the last run that ended by itself has measured."""
        return json.loads((self.directory / f"report.{rank}").read_text(encoding="utf-8"))


# --- what a kill may leave ------------------------------------------------------------------------------------------


def check_left(run: Run) -> int:
    """Check what a killed run has left: nothing that looks complete and is not. Returns the step that the next start
    resumes from."""
    steps = [0]
    for checkpoint in sorted(run.output.glob("checkpoints/step-*")):
        if checkpoint.suffix == ".partial":
            continue
        steps.append(read_common_state(checkpoint)["state"]["step"])
        assert checkpoint.name == f"step-{steps[-1]:06d}"
        tensors_of(checkpoint)
        RunConfig.from_yaml(checkpoint / "real_megatron.yaml")
    if (run.output / "config.yaml").exists():
        RunConfig.from_yaml(run.output / "config.yaml")
    if (run.output / "hf").exists():
        load_file(run.output / "hf/model.safetensors")
        json.loads((run.output / "hf/config.json").read_text())
        assert (run.output / "hf/tokenizer.json").exists()
        RunConfig.from_yaml(run.output / "hf/real_megatron.yaml")
    for file in run.output.glob("evaluation/*"):
        if file.suffix == ".json":
            assert json.loads(file.read_text())["metrics"], file
            assert file.with_suffix(".predictions.jsonl").exists()
        if file.suffix in (".json", ".jsonl"):
            assert file.read_text().endswith("\n"), file
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run.output / name).exists():
            lines = (run.output / name).read_text().split("\n")
            for line in lines[:-1]:  # the last one may be cut short
                json.loads(line)
    return max(steps)


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """A digest of each piece of tensor and object that a training checkpoint holds; fails where one cannot be read."""
    found = {}
    for index, place in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        assert len(data) == place.length, f"{checkpoint}: {place} is cut short"
        found[f"{index.fqn} {index.offset} {index.index}"] = hashlib.sha256(data).hexdigest()
    return found


# --- what a finished run is -----------------------------------------------------------------------------------------


def result_of(run: Run) -> dict[str, Any]:
    """All that a finished run has left, bit by bit, but for where it ran and how long it took."""
    output = run.output
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    found: dict[str, Any] = {"files": [name for name in files if not name.startswith(("tensorboard/", "rollout/logs"))]}
    for name in found["files"]:
        text = (output / name).read_bytes().replace(str(output).encode(), b"OUTPUT")
        if name == "metrics.jsonl":
            found[name] = [_without_times(json.loads(line)) for line in text.splitlines()]
        elif not name.startswith("checkpoints/"):
            found[name] = text
    for checkpoint in sorted(output.glob("checkpoints/step-*")):
        state = read_common_state(checkpoint)
        state["state"]["config"]["output"] = ""
        state["state"]["metrics"] = _without_times(state["state"]["metrics"])
        found[checkpoint.name] = tensors_of(checkpoint)
        found[f"{checkpoint.name} state"] = _plain(state)
        found[f"{checkpoint.name} run"] = yaml.safe_load((checkpoint / "real_megatron.yaml").read_text()) | {
            "output": ""
        }
    if (output / "tensorboard").exists():
        events = EventAccumulator(str(output / "tensorboard"), {"scalars": 0}).Reload()
        found["tensorboard"] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not _times(tag)
        }
    found["beside it"] = sorted(
        path.name for path in run.directory.iterdir() if path.name not in ("report.1", run.output.name)
    )
    found["scratch"] = sorted(str(path.relative_to(run.scratch)) for path in run.scratch.rglob("*"))
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names under which two results are not equal, with a part of what is there."""
    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        here, there = found.get(name), expected.get(name)
        if here != there and isinstance(here, dict) and isinstance(there, dict):
            wrong += [f"{name}: {line}" for line in differences(here, there)]
        elif here != there:
            wrong.append(f"{name}: {str(here)[:300]}\n  instead of {str(there)[:300]}")
    return wrong


def _times(name: str) -> bool:
    return name.startswith("seconds/") or name == "tokens_per_second"


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not _times(name)}


def _plain(value: Any) -> Any:
    """Tensors as bytes, so that what holds them can be compared."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
