"""One-step-off generation: the next batch is sampled while this one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class OneStepOff(Generic[T]):
    """Batches of rollouts, each generated in a background thread during the training step before its own.

    `take(step)` must be called once for each of `steps`, in order; the caller trains between two calls. It returns
    `generate(step)`. Before it returns, it has handed the policy's weights of that moment to the engine with
    `publish(step)` and started the next generation with them. So the batch of the first step comes from the newest
    weights, and every later one from weights that lack one training step, for which the objective should correct with
    an importance ratio.

    `publish` is called in the caller's thread, and never while a generation runs. An error of `generate` is raised by
    the `take` of its step. A batch that has been generated but not taken is lost when the run stops: after a resume it
    is generated again. Leaving the context because of an error does not wait for a generation that is under way:
    closing the engine ends it.
    """

    def __init__(self, generate: Callable[[int], T], publish: Callable[[int], None], steps: range) -> None:
        self._generate = generate
        self._publish = publish
        self._steps = steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._ahead: Future[T] | None = None

    def take(self, step: int) -> T:
        """The batch of `step`; the next one is being generated when this returns."""
        if self._ahead is None:
            self._start(step, step)
        assert self._ahead is not None
        batch = self._ahead.result()
        if step + 1 in self._steps:
            self._start(step + 1, step)
        return batch

    def _start(self, step: int, trained: int) -> None:
        """Generate the batch of `step` from the weights after `trained` training steps."""
        self._publish(trained)
        self._ahead = self._thread.submit(self._generate, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=error is None, cancel_futures=True)
