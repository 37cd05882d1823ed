"""An asyncio event loop in a thread of its own, for synchronous callers."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from real_megatron.errors import EngineError

T = TypeVar("T")

_POLL_S = 1.0


class LoopThread:
    """Runs coroutines for callers in other threads."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine. Raises EngineError when the loop's thread has ended."""
        if not self.alive:
            coroutine.close()
            raise EngineError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to completion; an interrupt of the caller cancels the coroutine.

        Raises EngineError when the loop's thread has ended: nothing would run the coroutine.
        """
        future = self.submit(coroutine)
        try:
            while not wait([future], timeout=_POLL_S).done:
                if not self.alive:
                    raise EngineError("the engine was closed during the request")
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def alive(self) -> bool:
        """Whether coroutines still run."""
        return self._thread.is_alive() and not self.loop.is_closed()

    def close(self) -> None:
        async def drain() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self.alive:
            self.run(drain())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        if not self.loop.is_closed():
            self.loop.close()


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Await a blocking function in a thread that never keeps the interpreter alive.

    A collective whose peer is gone may block until its own timeout: the awaiting task can be cancelled long before.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(setter: Callable[[Any], None], value: Any) -> None:
        def set_unless_done() -> None:
            if not done.done():
                setter(value)

        # After close() there is no one to wait for the result.
        if not loop.is_closed():
            loop.call_soon_threadsafe(set_unless_done)

    def work() -> None:
        try:
            result = function()
        except BaseException as error:
            deliver(done.set_exception, error)
        else:
            deliver(done.set_result, result)

    threading.Thread(target=work, daemon=True).start()
    return await done
