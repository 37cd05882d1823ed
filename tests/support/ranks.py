"""A pool of spawned gloo workers that lives as long as the test session.

Importing torch and Megatron-Core costs seconds per process, so the workers are started once and each call forms a
fresh process group among the first `world_size` of them.
"""

import atexit
import datetime
import gc
import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
from torch.distributed import TCPStore

# Far beyond what any test needs: shared machines stall for minutes, and only a real hang should fail.
TIMEOUT_S = 600


def _worker(conn: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.setpgid(0, 0)  # so that a test may signal a rank and all that it has started
    while True:
        task = conn.recv()
        if task is None:
            return
        rank, world_size, port, fn, args = task
        # Modules: half a million objects, which the collector would look at each time that a policy is forgotten. What
        # earlier calls made is gone.
        gc.freeze()
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=TIMEOUT_S))
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=TIMEOUT_S),
            )
            try:
                result = fn(*args)
            finally:
                _forget_groups()
            conn.send((True, result))
        except BaseException:
            conn.send((False, traceback.format_exc()))


def forget_policies() -> None:
    """Let go of finished policies, and with them of their process groups: each gloo group has a thread that polls a
    hundred times a second as long as anybody holds it, and hundreds of them slow the whole machine down."""
    from megatron.core.distributed import DistributedDataParallel

    # Hooks on gradient accumulators hold these in cycles through C++, which the collector does not see.
    for module in [found for found in gc.get_objects() if type(found) is DistributedDataParallel]:
        module.__dict__.clear()
    gc.collect()


def _forget_groups() -> None:
    import torch.distributed as dist

    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        forget_policies()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()


class RankPool:
    """Workers that run `fn(*args)` on ranks 0..world_size-1 of a gloo world and return their results in rank order."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        while len(self._workers) < world_size:
            parent, child = self._context.Pipe()
            # Not daemonic: Megatron's asynchronous checkpoint writers are children of the workers.
            process = self._context.Process(target=_worker, args=(child,))
            process.start()
            child.close()
            self._workers.append((process, parent))
        # Here and not on rank 0: a port that was free a moment ago may be another's by the time that a rank listens.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, conn) in enumerate(self._workers[:world_size]):
            conn.send((rank, world_size, store.port, fn, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {conn: rank for rank, (_, conn) in enumerate(self._workers[:world_size])}
        while waiting:
            # Once a rank has failed the others may hang in a collective: give them a moment, then start afresh.
            ready = wait(list(waiting), 5 if failures else TIMEOUT_S)
            if not ready:
                failures |= {rank: "no answer" for rank in waiting.values()}
                break
            for conn in ready:
                rank = waiting.pop(conn)
                try:
                    ok, value = conn.recv()
                except EOFError:
                    self._workers[rank][0].join(5)
                    ok, value = False, f"the worker died (exit code {self._workers[rank][0].exitcode})"
                (results if ok else failures)[rank] = value
        if failures:
            self.close(kill=True)
            raise RuntimeError("\n".join(f"rank {r} of {world_size}:\n{failures[r]}" for r in sorted(failures)))
        return [results[rank] for rank in range(world_size)]

    def close(self, kill: bool = False) -> None:
        for process, conn in self._workers:
            if kill:
                # With its children: Megatron's checkpoint writers have a queue process of their own.
                for child in psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []:
                    child.kill()
                process.kill()
            else:
                try:
                    conn.send(None)
                except OSError:
                    pass
        for process, conn in self._workers:
            process.join(10)
            if process.is_alive():
                process.kill()
            conn.close()
        self._workers = []


_pool = RankPool()
atexit.register(_pool.close)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Run module-level `fn(*args)` on `world_size` gloo ranks; return the picklable results in rank order."""
    return _pool.run(world_size, fn, *args)
