"""One-step-off generation: the next batch is sampled while this one trains."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

B = TypeVar("B")
T = TypeVar("T")


def rollouts(
    batches: Iterable[B], generate: Callable[[B], T], publish: Callable[[], None], staleness: int = 0
) -> Iterator[tuple[B, T]]:
    """Yields (batch, generate(batch)) for every batch, in order; the consumer trains between two items.

    publish: hands the policy's weights of that moment to the engine. It is called once before each generation, in the
        consumer's thread, and never while a generation runs.
    staleness: 0: generation uses the weights after the last training step. 1: the next generation is started, in a
        background thread, before this batch is handed out; it uses weights that lack this batch's training step, so the
        objective should correct with an importance ratio.

    A batch that has been generated but not handed out is lost when the consumer stops: after a resume it is generated
    again. An error of `generate` is raised where its batch would have been yielded.
    """
    if staleness == 0:
        for batch in batches:
            publish()
            yield batch, generate(batch)
        return
    if staleness != 1:
        raise ValueError(f"staleness {staleness}: 0 or 1")
    with ThreadPoolExecutor(1, thread_name_prefix="rollout") as thread:
        ahead: tuple[B, Future[T]] | None = None
        for batch in batches:
            ready = ahead and (ahead[0], ahead[1].result())
            publish()
            ahead = batch, thread.submit(generate, batch)
            if ready:
                yield ready
        if ahead:
            yield ahead[0], ahead[1].result()
