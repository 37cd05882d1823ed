"""Gloo ranks on this machine, for one piece of work."""

import datetime
import multiprocessing as mp
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_TIMEOUT_S = 1800
_PRELOADED = ["real_megatron.policy.policy", "real_megatron.rollout.sampling"]
"""Imported once, in the process that ranks are forked from: 32 imports would take longer than most of the work."""


def run(ranks: int, work: Callable[..., T], *args: Any) -> list[T]:
    """The results of `work(*args)`, run at once by `ranks` processes that form a gloo world; one thread each.

    work: of a module, so that a fresh process finds it. Raises RuntimeError with a rank's traceback.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    pipes, processes = [], []
    for rank in range(ranks):
        parent, child = context.Pipe()
        process = context.Process(target=_rank, args=(child, rank, ranks, store.port, work, args), daemon=False)
        process.start()
        child.close()
        pipes.append(parent)
        processes.append(process)
    try:
        results = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    for error, _ in results:
        if error:
            raise RuntimeError(error)
    return [result for _, result in results]


def _rank(pipe: Any, rank: int, ranks: int, port: int, work: Callable[..., T], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
        pipe.send((None, work(*args)))
        dist.barrier()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
