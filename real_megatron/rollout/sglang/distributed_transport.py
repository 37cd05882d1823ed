"""Weights by broadcast in a process group that joins the trainer and the servers."""

import asyncio
import secrets
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from real_megatron.errors import EngineError
from real_megatron.rollout.nccl import own_version
from real_megatron.rollout.remote.buckets import WeightBucket
from real_megatron.rollout.remote.loop import in_daemon_thread
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.group import SenderGroup
from real_megatron.rollout.sglang.transport import SyncTargets, Transport

# How long the other servers may take to notice that a broadcast was given up.
_GRACE_S = 15
# How much longer than a step the group's own timeout is. When NCCL's passes, it ends this whole process: before that
# the step's deadline must have dropped the slow server, and the group been given up.
_MARGIN_S = 2 * _GRACE_S


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

    async def open(self, targets: SyncTargets, label: str) -> None:
        await targets.each(lambda replica: self.control.quiesce(replica, label))
        await targets.each(self.control.begin)
        await self._form(targets)

    async def send(self, targets: SyncTargets, bucket: WeightBucket) -> None:
        group = await self._form(targets)
        if group is None:
            return
        body = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        # After `begin` a server accepts the broadcast. If it refuses all the same, it answers early: then the
        # broadcast, which would hang until its timeout, is not waited for.
        posts = {
            asyncio.create_task(self.control.post(replica, "/update_weights_from_distributed", body)): replica
            for replica in targets.alive
        }
        cast = asyncio.create_task(in_daemon_thread(partial(group.broadcast, bucket.flat)))
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
                    targets.drop(replica, f"no answer to a broadcast that failed elsewhere{reason}")
                elif post.exception():
                    targets.drop(replica, f"{post.exception()}{reason}{self._doubt(replica)}")
                elif broken and self._backend == "nccl":
                    # It has answered when it had queued the receipt, which may never come.
                    targets.drop(replica, f"took part in a broadcast that failed elsewhere{reason}")
        finally:
            for task in (*posts, cast):
                task.cancel()

    async def finish(self, targets: SyncTargets, label: str) -> None:
        await targets.each(self.control.end)

    async def close(self) -> None:
        if self._group is None:
            return
        name = self._group.name

        async def leave(replica: Replica) -> None:
            # A server that is gone has left already.
            with suppress(EngineError):
                await self.control.post(replica, "/destroy_weights_update_group", {"group_name": name})

        await asyncio.gather(*(leave(replica) for replica, _ in self._members))
        self._discard()

    async def _form(self, targets: SyncTargets) -> SenderGroup | None:
        """The group whose members are exactly the targets' servers, as often started as they were; None when no server
        is left."""
        if self._group is not None and [r.incarnation for r in targets.alive] == self._members:
            return self._group if targets.alive else None
        await self.close()
        while targets.alive:
            name = f"rollout-{secrets.token_hex(4)}"
            timeout_s = self.control.step_s + _MARGIN_S
            group = SenderGroup(name, self._backend, self._device, self._host, timeout_s)
            self._group = group
            if await self._join(group, targets):
                return group
            self._discard()
        return None

    async def _join(self, group: SenderGroup, targets: SyncTargets) -> bool:
        """Let all servers and this process join; False when a server, which then drops out, could not."""
        sizes: dict[Replica, int] = {}

        async def ask_size(replica: Replica) -> None:
            sizes[replica] = await self.control.tensor_parallel(replica)

        await targets.each(ask_size)
        if not targets.alive:
            return False
        world_size = 1 + sum(sizes[r] for r in targets.alive)
        offset = 1
        calls: dict[asyncio.Task[Any], Replica] = {}
        for replica in targets.alive:
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
        join = asyncio.create_task(in_daemon_thread(partial(group.join, world_size)))
        try:
            done, _ = await asyncio.wait(
                {*calls, join}, timeout=self.control.step_s, return_when=asyncio.FIRST_EXCEPTION
            )
            failures = {r: str(c.exception()) for c, r in calls.items() if c.done() and c.exception()}
            if len(done) == len(calls) + 1 and not failures and not join.exception():
                self._members = [r.incarnation for r in targets.alive]
                return True
            if not failures:
                reason = str(join.exception()) if join.done() else "timeout"
                failures = dict.fromkeys(targets.alive, reason)
            for replica, reason in failures.items():
                targets.drop(replica, f"cannot join the process group: {reason}{self._doubt(replica)}")
            return False
        finally:
            for task in (*calls, join):
                task.cancel()

    def _doubt(self, replica: Replica) -> str:
        """What may be behind a failure of an attached server; of a local one it has been checked (`check_nccl`)."""
        if self._backend != "nccl" or replica.process is not None:
            return ""
        return (
            f" (NCCL is {own_version()} here and must be the same there, which a server does not tell: compare, or set "
            "rollout.weight_sync to disk)"
        )

    def _discard(self) -> None:
        group, self._group, self._members = self._group, None, []
        if group is not None:
            # Closing waits for a broadcast that still runs.
            task = asyncio.ensure_future(in_daemon_thread(group.abort))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
