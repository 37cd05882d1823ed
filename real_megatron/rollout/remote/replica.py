"""Servers as replicas of one model: who may take traffic, how a failed one comes back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal
from urllib.parse import urlsplit

from real_megatron.errors import EngineError
from real_megatron.rollout.remote.errors import Unreachable, WrongServer
from real_megatron.rollout.remote.process import ServerProcess

logger = logging.getLogger(__name__)
_POLL_S = 0.5
_PROBE_S = 60

State = Literal["down", "stale", "ready", "dead"]


class Replica:
    """One server. Only a `ready` one takes requests: it is up, and holds the current weights."""

    def __init__(self, url: str, process: ServerProcess | None = None) -> None:
        self.url = url.rstrip("/")
        self.process = process
        """None when the server was started by someone else."""
        self.state: State = "down"
        """down: not up (yet); stale: up, with weights that are not the current ones; dead: given up."""
        self.reason = "not started"
        self.in_flight = 0
        self.failures_in_a_row = 0
        self.recoveries = 0
        self.label: str | None = None
        """The weight label that its replies must carry."""
        self.known: tuple[Replica, int] | None = None
        """The incarnation that has been seen to be the server asked for."""

    @property
    def port(self) -> int:
        """Of a local server."""
        return urlsplit(self.url).port or 0

    @property
    def incarnation(self) -> tuple["Replica", int]:
        """Changes when the process is started anew, or, with a process that others run, may have been."""
        return self, self.process.starts if self.process else self.recoveries

    def check_process(self) -> None:
        """Raise Unreachable when a server that was started here has ended: by now another's may listen there."""
        if self.process is not None and not self.process.alive():
            raise Unreachable("its process has ended")

    def describe(self) -> str:
        return f"{self.url} is {self.state} ({self.reason})"


class NoCurrentWeights(Exception):
    """A server is up, but there is nothing to bring it up to date with before the next sync."""


class _GivenUp(Exception):
    """A replica failed too often in a row."""


class ReplicaPool:
    """Routing to the least-loaded ready replica, and recovery of the others. Used from one event loop only."""

    def __init__(
        self,
        replicas: list[Replica],
        *,
        concurrency: int,
        start_timeout_s: float,
        restarts: int,
        port_taken: Callable[[int], str],
        probe: Callable[[Replica, float], Awaitable[None]],
        restore: Callable[[Replica], Awaitable[None]],
    ) -> None:
        """
        port_taken: why a local server cannot be started on that port; empty if it can
        probe: raises Unreachable unless the server answers its health check within so many seconds, WrongServer if it
            is another one than asked for
        restore: brings a server that is up to the current weights and sets `label`; raises NoCurrentWeights when
            it cannot yet
        """
        self.replicas = replicas
        self._concurrency = concurrency
        self._start_timeout_s = start_timeout_s
        self._restarts = restarts
        self._port_taken = port_taken
        self._probe = probe
        self._restore = restore
        self._waiters: list[asyncio.Future] = []
        self._recoveries: dict[Replica, asyncio.Task] = {}

    # --- routing ----------------------------------------------------------------------------------------------------

    async def acquire(self) -> Replica:
        """A ready replica with room for one more request; waits for room, or for a recovery that is under way."""
        while True:
            ready = [r for r in self.replicas if r.state == "ready"]
            if not ready and not self._recoveries:
                raise EngineError(f"no rollout server can serve: {self.describe()}")
            free = [r for r in ready if r.in_flight < self._concurrency]
            if free:
                chosen = min(free, key=lambda r: r.in_flight)
                chosen.in_flight += 1
                return chosen
            await self._change()

    def release(self, replica: Replica) -> None:
        replica.in_flight -= 1
        self._notify()

    def describe(self) -> str:
        """State of every replica, for an error message."""
        return "; ".join(replica.describe() for replica in self.replicas)

    def set_state(self, replica: Replica, state: State, reason: str) -> None:
        if state != replica.state:
            level = logging.ERROR if state == "dead" else logging.INFO
            logger.log(level, "rollout server %s: %s (%s)", replica.url, state, reason)
        replica.state, replica.reason = state, reason
        self._notify()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    # --- recovery ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every managed server and wait until all are up; they then are stale or ready."""
        for replica in self.replicas:
            self.recover(replica, "starting")
        await self.settled()
        dead = [r for r in self.replicas if r.state == "dead"]
        if dead:
            raise EngineError("; ".join(r.describe() for r in dead))

    async def settled(self) -> None:
        """Wait until no recovery is under way."""
        while self._recoveries:
            await self._change()

    async def any_ready(self) -> bool:
        """Wait until a replica is ready, or no recovery is left that could make one so."""
        while self._recoveries and not any(r.state == "ready" for r in self.replicas):
            await self._change()
        return any(r.state == "ready" for r in self.replicas)

    def recover(self, replica: Replica, reason: str) -> None:
        """Take a replica out of service and bring it back in the background; does nothing while that is under way."""
        if replica in self._recoveries or replica.state == "dead":
            return
        if replica.state == "ready":
            logger.warning("rollout server %s taken out of service: %s", replica.url, reason)
            self.set_state(replica, "stale", reason)
        replica.reason = reason
        self._recoveries[replica] = asyncio.get_running_loop().create_task(self._recover(replica))

    async def _recover(self, replica: Replica) -> None:
        state: State = "dead"
        replica.recoveries += 1
        try:
            while True:
                try:
                    await self._bring_up(replica)
                    await self._restore(replica)
                    state, replica.reason = "ready", "up to date"
                    return
                except NoCurrentWeights as error:
                    state, replica.reason = "stale", str(error)
                    return
                except WrongServer as error:
                    replica.reason = str(error)
                    if replica.process is not None:
                        await asyncio.to_thread(replica.process.kill)
                    return
                except (EngineError, Unreachable, OSError) as error:
                    replica.reason = f"{type(error).__name__}: {error}"
                    logger.warning("rollout server %s: %s", replica.url, replica.reason)
                    self._count_failure(replica)
                    if replica.process is not None:
                        await asyncio.to_thread(replica.process.kill)
                    await asyncio.sleep(_POLL_S)
        except _GivenUp as error:
            replica.reason = f"given up after {replica.failures_in_a_row} recoveries in a row: {error}"
        except Exception as error:
            logger.exception("recovery of rollout server %s failed", replica.url)
            replica.reason = repr(error)
        finally:
            self._recoveries.pop(replica, None)
            self.set_state(replica, state, replica.reason)

    def _count_failure(self, replica: Replica) -> None:
        if replica.failures_in_a_row >= self._restarts:
            raise _GivenUp(replica.reason)
        replica.failures_in_a_row += 1

    async def _bring_up(self, replica: Replica) -> None:
        """Return once the server answers its health check; start or restart it if it is ours and does not."""
        process = replica.process
        if process is None:
            await self._wait_healthy(replica)
            self.set_state(replica, "stale", "attached")
            return
        if process.alive() and replica.state != "down":
            try:
                await self._probe(replica, _PROBE_S)
                return
            except Unreachable as error:
                replica.reason = f"no answer to the health check ({error})"
                self._count_failure(replica)
        elif process.starts and replica.state != "down":
            replica.reason = "ended: " + process.describe_end()
            self._count_failure(replica)
        self.set_state(replica, "down", replica.reason)
        await asyncio.to_thread(process.kill)  # what is left of it would hold the port
        if reason := self._port_taken(replica.port):
            # Another's server there would answer in the place of ours. After a crash it may be a process that is just
            # ending.
            raise EngineError(reason) if process.starts else WrongServer(reason)
        await asyncio.to_thread(process.start)
        await self._wait_healthy(replica)
        self.set_state(replica, "stale", "just started")

    async def _wait_healthy(self, replica: Replica) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            if replica.process is not None and not replica.process.alive():
                raise EngineError("the server ended while starting: " + replica.process.describe_end())
            try:
                await self._probe(replica, _PROBE_S)
                return
            except Unreachable as error:
                if time.monotonic() > deadline:
                    hint = replica.process.describe_end() if replica.process else "is it running?"
                    raise EngineError(
                        f"{replica.url} was not healthy within {self._start_timeout_s:.0f} s ({error}): {hint}"
                    ) from error
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        for task in list(self._recoveries.values()):
            task.cancel()
        for replica in self.replicas:
            replica.state, replica.reason = "dead", "closed"
        processes = [r.process for r in self.replicas if r.process is not None]
        await asyncio.gather(*(asyncio.to_thread(process.close) for process in processes))
