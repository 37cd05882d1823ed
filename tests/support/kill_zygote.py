"""Starts training runs within milliseconds, by forking a process that has imported all that they need.

    python -m tests.support.kill_zygote

Reads a `Start` per line from standard input, as JSON, and answers each with an `End`. Of each run a process of its own,
the agent, starts the ranks, as torchrun does, and sees how they end. It is the reaper of all processes below it, so
that nothing that a run has started can leave it.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from real_megatron.processes import end_with

IMPORTS = (
    *("real_megatron.cli", "real_megatron.policy.policy", "real_megatron.training.rl", "real_megatron.training.sft"),
    *("tests.support.kill_points", "torch.utils.tensorboard", "transformers.models.qwen3.modeling_qwen3"),
)
"""All that a run imports, before the first fork."""
PEERS_S = 5
"""How long ranks may take to end by themselves when another has died, before the agent ends them."""
GONE_S = 30
"""How long after the ranks their servers may last."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Start:
    """A run to start.

    command: of real-megatron, with its arguments. kill: arguments of `Killer`, for each of `killed_ranks`.
    environment: variables of the ranks. log: where their output goes. report: where rank 0 leaves the seconds of its
    phases and its file operations, where it ends by itself.
    """

    command: list[str]
    ranks: int
    log: str
    report: str
    kill: dict[str, Any] = field(default_factory=dict)
    killed_ranks: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    setup: str = ""
    """`module:function`, called in each rank before the run."""
    files_below: str = ""
    """Report and kill at file operations below this directory."""


@dataclass(frozen=True)
class End:
    """How a run ended."""

    codes: list[int]
    """Exit status of each rank; minus the number of the signal that ended it."""
    peers_s: float
    """Seconds from the first death until the last rank had ended."""
    gone_s: float
    """Seconds from the first death until no process of the run was left."""
    ended_by_agent: int
    """Ranks that did not end by themselves within PEERS_S."""
    left: list[str]
    """Commands of processes that outlived the run by GONE_S."""
    seconds: float
    """From the start to the first death."""


def _agent(start: Start, zygote: int) -> End:
    end_with(zygote)
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    agent, began, store = os.getpid(), time.monotonic(), None
    pipes = [os.pipe() for _ in range(start.ranks)]
    pids = []
    for rank, (reading, _) in enumerate(pipes):
        if not (pid := os.fork()):
            end_with(agent)
            _rank(start, rank, reading)
        pids.append(pid)
    if start.ranks > 1:  # after the forks, which a store's threads would not survive
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for _, writing in pipes:
        os.write(writing, f"{store.port if store else 0:6d}".encode())
    codes: dict[int, int] = {}
    first = last = deadline = gone = 0.0
    by_agent = 0
    left: list[str] = []
    while True:
        now = time.monotonic()
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            gone = now
            break
        if pid in pids:
            first, last = first or now, now
            deadline = now + (GONE_S if len(codes) + 1 == start.ranks else PEERS_S)
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif not pid:
            if deadline and now > deadline:
                if len(codes) < start.ranks:
                    by_agent = start.ranks - len(codes)
                    for one in set(pids) - codes.keys():
                        os.kill(one, signal.SIGKILL)
                    deadline = now + GONE_S
                else:
                    for process in psutil.Process().children(recursive=True):
                        left.append(" ".join(process.cmdline()[:8]))
                        process.kill()
                    deadline = now + GONE_S
            time.sleep(0.002)
    return End([codes[pid] for pid in pids], last - first, gone - first, by_agent, left, first - began)


def _rank(start: Start, rank: int, port: int) -> None:
    code = 1
    try:
        log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        number = int(os.read(port, 6))
        if start.ranks > 1:
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(start.ranks)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number), "TORCHELASTIC_USE_AGENT_STORE": "True"},
            }
        os.environ |= start.environment
        code = _run(start, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(start: Start, rank: int) -> int:
    from real_megatron.cli import app
    from tests.support.kill_points import Killer, patched

    root = start.files_below or None
    killer = Killer(root=root, **(start.kill if rank in start.killed_ranks else {}))
    if root:
        killer.watch_files()
    if start.setup:
        module, _, name = start.setup.partition(":")
        getattr(importlib.import_module(module), name)()
    code = 0
    with patched(killer):
        killer.enter("start")
        killer.enter("resume")
        try:
            app(start.command)
        except SystemExit as end:
            code = int(end.code or 0)
    report = {"seconds": killer.seconds, "operations": killer.operations}
    Path(f"{start.report}.{rank}").write_text(json.dumps(report), encoding="utf-8")
    return code


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    zygote = os.getpid()
    for line in sys.stdin:
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            try:
                os.close(0)
                os.write(writing, json.dumps(asdict(_agent(Start(**json.loads(line)), zygote))).encode())
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            print(answer.read(), file=answers, flush=True)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
