"""Weights by broadcast in a process group that joins the trainer and the servers."""

import asyncio
import secrets
from contextlib import suppress

import torch

from real_megatron.rollout.remote.buckets import Bucket
from real_megatron.rollout.remote.errors import RolloutError
from real_megatron.rollout.remote.loop import in_daemon_thread
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.group import SenderGroup
from real_megatron.rollout.sglang.transport import Flight, Transport

# How long the other servers may take to notice that a broadcast was given up.
_GRACE_S = 15


class DistributedTransport(Transport):
    """`/update_weights_from_distributed`: one broadcast per bucket, trainer to all servers, over NCCL or gloo.

    The group lives from sync to sync and is formed anew when its members change or one of them fails.
    """

    def __init__(self, control: Control, device: torch.device, host: str) -> None:
        """device: from which the trainer sends: NCCL from a GPU, gloo from the host"""
        super().__init__(control)
        self._device = device
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._host = host
        self._group: SenderGroup | None = None
        self._members: list[tuple[Replica, int]] = []

    async def open(self, flight: Flight, version: str) -> None:
        await flight.each(lambda replica: self.control.quiesce(replica, version))
        await flight.each(self.control.begin)
        await self._form(flight)

    async def send(self, flight: Flight, bucket: Bucket) -> None:
        await self._form(flight)
        if not flight.alive:
            return
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": bucket.shapes,
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        # The open bracket is the server's acceptance. What it still refuses shows as an early answer: then nobody
        # waits for the broadcast, which would hang until its timeout.
        posts = {
            asyncio.create_task(self.control.post(replica, "/update_weights_from_distributed", body)): replica
            for replica in flight.alive
        }
        group = self._group
        cast = asyncio.create_task(in_daemon_thread(lambda: group.broadcast(bucket.flat)))
        try:
            done, _ = await asyncio.wait(
                {*posts, cast}, timeout=self.control.step_s, return_when=asyncio.FIRST_EXCEPTION
            )
            broken = len(done) <= len(posts) or any(task.exception() for task in done)
            if broken:
                self._discard()
                await asyncio.wait(posts, timeout=_GRACE_S)
            reason = f"; broadcast: {cast.exception()}" if cast.done() and cast.exception() else ""
            for post, replica in posts.items():
                if not post.done():
                    flight.drop(replica, f"no answer to a broadcast that failed elsewhere{reason}")
                elif post.exception():
                    flight.drop(replica, f"{post.exception()}{reason}")
                elif broken and self._backend == "nccl":
                    # It has answered when it had queued the receipt, which may never come.
                    flight.drop(replica, f"took part in a broadcast that failed elsewhere{reason}")
        finally:
            for task in (*posts, cast):
                task.cancel()

    async def finish(self, flight: Flight, version: str) -> None:
        await flight.each(self.control.end)

    async def close(self) -> None:
        if self._group is None:
            return
        name = self._group.name

        async def leave(replica: Replica) -> None:
            # A server that is gone has left already.
            with suppress(RolloutError):
                await self.control.post(replica, "/destroy_weights_update_group", {"group_name": name})

        await asyncio.gather(*(leave(replica) for replica, _ in self._members))
        self._discard()

    async def _form(self, flight: Flight) -> None:
        """Make sure that the group's members are exactly the flight's servers, as often started as they were."""
        members = [r.incarnation for r in flight.alive]
        if self._group is not None and members == self._members:
            return
        await self.close()
        while flight.alive:
            name = f"rollout-{secrets.token_hex(4)}"
            group = SenderGroup(name, self._backend, self._device, self._host, self.control.step_s)
            self._group = group
            sizes: dict[Replica, int] = {}

            async def size(replica: Replica, sizes: dict[Replica, int] = sizes) -> None:
                sizes[replica] = await self.control.tensor_parallel(replica)

            await flight.each(size)
            world_size = 1 + sum(sizes[r] for r in flight.alive)
            offset, calls = 1, {}
            for replica in flight.alive:
                body = {
                    "master_address": self._host,
                    "master_port": group.port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": group.name,
                    "backend": self._backend,
                }
                offset += sizes[replica]
                call = self.control.post(replica, "/init_weights_update_group", body)
                calls[asyncio.create_task(call)] = replica
            join = asyncio.create_task(in_daemon_thread(lambda g=group, w=world_size: g.join(w)))
            try:
                done, _ = await asyncio.wait(
                    {*calls, join}, timeout=self.control.step_s, return_when=asyncio.FIRST_EXCEPTION
                )
                failures = {r: c.exception() for c, r in calls.items() if c.done() and c.exception()}
                if len(done) == len(calls) + 1 and not failures and not join.exception():
                    self._members = [r.incarnation for r in flight.alive]
                    return
                if not failures:
                    reason = join.exception() if join.done() else "timeout"
                    failures = {r: reason for r in flight.alive}
                for replica, reason in failures.items():
                    flight.drop(replica, f"cannot join the process group: {reason}")
            finally:
                for task in (*calls, join):
                    task.cancel()
            self._discard()

    def _discard(self) -> None:
        group, self._group, self._members = self._group, None, []
        if group is not None:
            # Closing waits for a broadcast that still runs.
            task = asyncio.ensure_future(in_daemon_thread(group.abort))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
