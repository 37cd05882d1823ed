"""A run whose rollouts come from a real SGLang server, killed and started again: no process of a server that it has
started outlives it, a server that it was attached to does, and the run ends with each step done once.

    KILLS=20 python -m pytest tests/training/test_kills_served.py -s

kills each phase 20 times where the server is attached, and 5 times where the run starts it, since a start takes long;
prints the table of docs/surviving.md. Not bit-identical: SGLang's sampling has no seeds.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from real_megatron.rollout.engine import EngineSpec
from real_megatron.rollout.remote.ports import free_ports, in_use
from real_megatron.rollout.sglang.engine import SGLangEngine
from tests.support.kill_chains import kill_often
from tests.support.kill_points import SERVED_PHASES
from tests.support.kills import Run, killed_config
from tests.support.served_runs import SAME, uneven_task
from tests.support.tiny_runs import rows

KILLS = int(os.environ.get("KILLS", "0"))
pytestmark = [pytest.mark.sglang, pytest.mark.skipif(not KILLS, reason="a server's start for each kill: set KILLS")]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_task(tmp_path_factory.mktemp("task"))


def samples(run: Run) -> list[tuple[int, str]]:
    """The step and the example of each row of samples.jsonl."""
    lines = (run.output / "samples.jsonl").read_text().splitlines()
    return [(row["step"], row["id"]) for row in map(json.loads, lines)]


def faults(run: Run, whole: Run) -> list[str]:
    """What of a finished run is not as it has to be, whatever the server has sampled."""
    found = rows(run.output)
    wrong = []
    if [row["step"] for row in found] != [0, 1, 2, 3]:
        wrong.append(f"metrics of steps {[row['step'] for row in found]}")
    # All four responses of a step are shown.
    if samples(run) != samples(whole) or len(samples(run)) != 3 * 4:
        wrong.append(f"samples {samples(run)}")
    for row in found[1:]:
        if row["mismatch/max"] >= SAME or row["rollout/small_groups"] or row["rollout/empty_groups"]:
            wrong.append(f"a step's rollouts: {row}")
    if files(run) != files(whole):
        wrong.append(f"files {files(run)}")
    return wrong


def files(run: Run) -> list[str]:
    """What a run has left, but for logs; weights that went by disk without their random label."""
    names = (str(file.relative_to(run.output)) for file in run.output.rglob("*") if file.is_file())
    kept = (name for name in names if not name.startswith(("tensorboard/", "rollout/logs/")))
    return sorted(re.sub("^rollout/weights/[^/]*-3/", "rollout/weights/", name) for name in kept)


def chain(server: str, run: Run, whole: Run, phase: str, kills: int, left: Callable[[Run], None]) -> None:
    """Kill a run so often and print what came of it, a row of the table."""
    tally = kill_often(run, whole, [phase] * kills, seed=16, faults=lambda one: faults(one, whole), left=left)
    print(f"\n| {server} {tally.row()}", end=" ")


# --- a server that the run starts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(sglang_python: str) -> dict:
    (port,) = free_ports(1)
    return {"engine": "sglang", "python": sglang_python, "port": port, "concurrency": 2, "start_timeout_s": 900}


@pytest.fixture(scope="module")
def whole(task: Path, rollout: dict, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    run = Run(directory, killed_config(task, directory / "out", rollout=rollout), 1)
    run.finish()
    return run


@pytest.mark.parametrize("phase", SERVED_PHASES)
def test_no_server_outlives_the_run_that_has_started_it(
    phase: str, task: Path, rollout: dict, whole: Run, tmp_path: Path
) -> None:
    """Nor does anything hold its port, which all starts here have in common."""

    def left(run: Run) -> None:
        assert not in_use(rollout["port"])

    run = Run(tmp_path / "run", killed_config(task, tmp_path / "run/out", rollout=rollout), 1)
    chain("started", run, whole, phase, max(1, KILLS // 4), left)


# --- a server that the run is attached to ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(task: Path, rollout: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    config = killed_config(task, tmp_path_factory.mktemp("out"), rollout=rollout | {"port": 0})
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    lengths = {name: getattr(config.data, name) for name in ("max_prompt_tokens", "max_response_tokens")}
    spec = EngineSpec(config.rollout, task / "model", tokenizer, tmp_path_factory.mktemp("server"), **lengths)
    engine = SGLangEngine(spec)
    yield engine
    engine.close()


@pytest.mark.parametrize("transport", ["distributed", "tensor", "disk"])
@pytest.mark.parametrize("phase", ["rollout", "send", "update"])
def test_an_attached_server_goes_on_and_is_brought_up_to_date(
    phase: str, transport: str, task: Path, server: SGLangEngine, tmp_path: Path
) -> None:
    """`mismatch/max` shows that: with other weights it is far from `SAME`."""
    attached = {"engine": "sglang", "servers": server.urls, "api_key_variable": "KEY", "weight_sync": transport}
    # Shared memory has a socket in TMPDIR, whose path may not be long.
    environment = {"KEY": server.api_key, "TMPDIR": tempfile.gettempdir()}
    runs = []
    for name in ("whole", "run"):
        config = killed_config(task, tmp_path / name / "out", rollout=attached)
        runs.append(Run(tmp_path / name, config, 1, environment=environment))
    whole, run = runs
    whole.finish()
    process = server._pool.replicas[0].process

    def left(run: Run) -> None:
        assert process.alive()
        held = [file.name for file in Path("/dev/shm").glob("torch_*")]  # torch_PROCESS_…
        assert all(psutil.pid_exists(int(name.split("_")[1])) for name in held), f"memory of a dead trainer: {held}"

    chain(f"attached, {transport}", run, whole, phase, KILLS, left)
    assert process.starts == 1
