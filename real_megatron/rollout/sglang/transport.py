"""What carries weights to servers: the interface of the three transports, and the record of who is still reached."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from real_megatron.rollout.remote.buckets import WeightBucket
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.control import Control


class SyncTargets:
    """The servers that a sync still reaches, and why the others dropped out."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.alive = list(replicas)
        self.failed: dict[Replica, str] = {}

    def drop(self, replica: Replica, reason: str) -> None:
        if replica in self.alive:
            self.alive.remove(replica)
            self.failed[replica] = reason

    async def each(self, step: Callable[[Replica], Awaitable[None]]) -> None:
        """Run a step on all at once; a server on which it fails drops out, the others go on."""
        results = await asyncio.gather(*(step(r) for r in self.alive), return_exceptions=True)
        for replica, result in zip(list(self.alive), results, strict=True):
            if isinstance(result, Exception):
                self.drop(replica, str(result))
            elif isinstance(result, BaseException):
                raise result


class Transport(ABC):
    """Carries the buckets of one sync: open, send each, finish. A server's failure is recorded in the targets; an error
    that concerns every server (a full disk) is raised."""

    def __init__(self, control: Control) -> None:
        self.control = control

    @abstractmethod
    async def open(self, targets: SyncTargets, label: str) -> None: ...

    @abstractmethod
    async def send(self, targets: SyncTargets, bucket: WeightBucket) -> None: ...

    @abstractmethod
    async def finish(self, targets: SyncTargets, label: str) -> None: ...

    async def restore(self, replica: Replica, label: str) -> bool:
        """Load the last finished sync into one server, without the buckets; False when this transport keeps none."""
        return False

    async def close(self) -> None:
        """Release what outlives one sync."""
        return
