"""Independent tasks over processes, with one progress bar in bytes."""

import logging
import multiprocessing as mp
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

Progress = Callable[[int], None]
Work = Callable[[Any, Progress], Any]

_state: dict[str, Any] = {}


def run(
    work: Work, tasks: Sequence[Any], total_bytes: int, workers: int, title: str, show_progress: bool = True
) -> list[Any]:
    """`work(task, progress)` for each task; results in order. `progress(n)` reports n more bytes done.

    `work` and tasks must be picklable. One worker runs in this process. An exception in any task ends the run.
    """
    disable = None if show_progress else True  # None: no bar in a file or pipe
    with tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        if min(workers, len(tasks)) <= 1:
            return [work(task, advance) for task in tasks]
        context = mp.get_context("spawn")
        done = context.Value("q", 0)
        verbose = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (work, done, verbose)) as pool:
            futures = [pool.submit(_run, task) for task in tasks]
            try:
                results = []
                for future in futures:
                    while not future.done():
                        _wait(future)
                        bar.update(done.value - bar.n)
                    results.append(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        bar.update(done.value - bar.n)
        return results


def _wait(future: Future[Any]) -> None:
    try:
        future.exception(timeout=0.2)
    except TimeoutError:
        pass


def _start(work: Work, done: Any, verbose: bool) -> None:
    if not verbose:
        warnings.simplefilter("ignore")  # other packages' would go to the terminal, between the lines of this one
    torch.set_num_threads(1)
    _state["work"], _state["done"] = work, done


def _run(task: Any) -> Any:
    return _state["work"](task, _report)


def _report(count: int) -> None:
    done = _state["done"]
    with done.get_lock():
        done.value += count
