"""The SGLang engine: requests over HTTP, weights over a process group, shared memory or disk."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from real_megatron.errors import EngineError
from real_megatron.rollout.checkpoint_names import check_names
from real_megatron.rollout.engine import EngineSpec, Response, SamplingParams, drain, register_engine
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.engine import RemoteEngine
from real_megatron.rollout.remote.kept import KeptWeights
from real_megatron.rollout.remote.replica import NoCurrentWeights, Replica
from real_megatron.rollout.remote.servers import weight_sync
from real_megatron.rollout.remote.spool import CheckpointSpool
from real_megatron.rollout.sglang import replies
from real_megatron.rollout.sglang.command import server_command
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.disk_transport import DiskTransport
from real_megatron.rollout.sglang.distributed_transport import DistributedTransport
from real_megatron.rollout.sglang.tensor_transport import TensorTransport
from real_megatron.rollout.sglang.transport import SyncTargets, Transport
from real_megatron.scores import Branch

logger = logging.getLogger(__name__)


@register_engine(
    "sglang",
    server_package="sglang",
    broadcasts=True,
    reserved_tokens=replies.RESERVED_TOKENS,
    server_command=server_command,
)
class SGLangEngine(RemoteEngine):
    """RolloutEngine on SGLang servers (0.5.21), started here or attached to.

    Each set of weights has a label that the servers repeat in every reply; a reply from other weights is never
    returned. Sampling is not seeded: SGLang gives all K samples of a request one seed.

    Attached servers with an API key (`rollout.api_key_variable`) must have no `--admin-api-key`, or the same as
    `--api-key`: each request carries one key.
    """

    _name = "sglang"
    _path = "/generate"
    _guarded_path = "/model_info"

    def __init__(self, spec: EngineSpec) -> None:
        """
        With `spec.serve_loaded`, attached servers are asked whether they hold the checkpoint. The checkpoint's tensor
        names are what a sync must deliver. Raises EngineError when a server cannot be started or reached.
        """
        super().__init__(spec)
        self._kept = KeptWeights(copies=spec.device.type == "cuda")
        self._released: dict[tuple[Replica, int], list[str]] = {}
        """What each server process has released; one that was started anew since has not."""
        self._control = Control(self._http, spec.config.sync_timeout_s)
        self._new_transport = _transport_factory(spec, self._control)
        self._transport = self._new_transport()
        self._start()
        if spec.config.servers and spec.fp32_logits and spec.dtype.itemsize < 4:
            self._loop.run(self._warn_of_rounded_logits())

    async def _warn_of_rounded_logits(self) -> None:
        rounding: set[str] = set()

        async def one(replica: Replica) -> None:
            if await self._control.rounds_logits(replica):
                rounding.add(replica.url)

        await self._each_up(one)
        # As they are configured, not as they answered.
        rounded = [replica.url for replica in self._pool.replicas if replica.url in rounding]
        if rounded:
            logger.warning(
                "%s: logits are rounded to 16 bits there, and float32 in the policy: start the servers with "
                "--enable-fp32-lm-head, or set model.fp32_logits to false",
                ", ".join(rounded),
            )

    # --- requests ---------------------------------------------------------------------------------------------------

    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]:
        return replies.generation_body(prompt, params, self._stop_ids)

    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        return replies.parse_generation(reply, params, self._current_labels(replica), self._served_version())

    def _scoring_body(self, sequence: list[int], branches: Sequence[Branch]) -> dict[str, Any]:
        return replies.scoring_body(sequence, branches)

    def _parse_scoring(self, reply: Any, replica: Replica, branches: Sequence[Branch]) -> list[float]:
        return replies.parse_scoring(reply, branches, self._current_labels(replica))

    def _current_labels(self, replica: Replica) -> set[str]:
        # Behind a router any server may have answered.
        answering = self._pool.replicas if self._config.router else [replica]
        return {r.label for r in answering if r.label is not None}

    # --- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As RemoteEngine. A server that fails on the way drops out, is brought up to date in the background from the
        weights kept in host memory (`rollout.keep_weights`), and takes no request before."""
        stream = iter(tensors)
        # A server that comes back from now on finds no current weights. One that is brought up to date meanwhile reads
        # those kept of the last sync: they stay until it is done.
        self._label, self.version = None, None
        try:
            self._loop.run(self._pool.settled())
            targets = self._send(stream, self._labels.of(version))
        finally:
            drain(stream)
        self._label, self.version = self._labels.of(version), version
        self._loop.run(self._conclude(targets))

    def _send(self, stream: Iterator[tuple[str, Tensor]], label: str) -> SyncTargets:
        if self._asleep:
            self._loop.run(self._resume(["weights"]))
        targets = self._loop.run(self._open_sync(label))
        keep = self._config.keep_weights and not isinstance(self._transport, DiskTransport)
        if keep:
            self._kept.begin()
        shapes: dict[str, list[int]] = {}
        for bucket in bucketed(stream, self._config.bucket_mib * 2**20, self._dtype):
            shapes |= zip(bucket.names, bucket.shapes, strict=True)
            if keep:
                self._kept.add(bucket)
            if targets.alive:
                self._loop.run(self._transport.send(targets, bucket))
            self._kept.wait()
        check_names(self._model_dir, shapes, self._tied)
        self._loop.run(self._close_sync(self._transport, targets, label))
        if keep:
            self._kept.finish()
        return targets

    async def _open_sync(self, label: str) -> SyncTargets:
        targets = SyncTargets([r for r in self._pool.replicas if r.state in ("ready", "stale")])
        for replica in targets.alive:
            self._pool.set_state(replica, "stale", "weight sync")
        await self._transport.open(targets, label)
        return targets

    async def _close_sync(self, transport: Transport, targets: SyncTargets, label: str) -> None:
        await transport.finish(targets, label)
        await targets.each(lambda replica: self._control.admit(replica, label))

    async def _conclude(self, targets: SyncTargets) -> None:
        for replica in targets.alive:
            replica.label = self._label
            self._pool.set_state(replica, "ready", f"weights {self._label}")
        for replica, reason in targets.failed.items():
            self._pool.recover(replica, f"weight sync failed: {reason}")
        await self._require_weights()

    async def _check_health(self, replica: Replica, timeout_s: float) -> None:
        # The health check generates a token. A server that a failed sync left paused would never do so; it may go on,
        # since its weights are labelled as incomplete and it gets no requests.
        url = replica.url + "/continue_generation"
        (await self._http.post(url, {}, timeout_s)).check(url)
        await super()._check_health(replica, timeout_s)

    async def _loaded(self, replica: Replica) -> tuple[str, str]:
        return await self._control.loaded(replica)

    async def _restore(self, replica: Replica) -> None:
        if self._serve_loaded and self._label is None:
            replica.label = await self._control.weight_label(replica)
            return
        label, kept = self._label, self._kept.buckets
        if label is None:
            raise NoCurrentWeights("waiting for the next sync")
        if replica.label == label and await self._control.weight_label(replica) == label:
            await self._control.unpause(replica)
            return
        if await self._transport.restore(replica, label):
            await self._control.admit(replica, label)
        elif kept is not None:
            transport = self._new_transport()
            targets = SyncTargets([replica])
            try:
                await transport.open(targets, label)
                for bucket in kept:
                    await transport.send(targets, bucket)
                await self._close_sync(transport, targets, label)
            finally:
                await transport.close()
            if targets.failed:
                raise EngineError(targets.failed[replica])
        else:
            raise NoCurrentWeights("its weights are gone and rollout.keep_weights is off")
        replica.label = label

    # --- memory -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Servers release the memory of weights and KV cache (of the cache alone when they serve what they loaded).

        Takes effect with SGLang's memory saver, which colocated servers are started with; without a GPU nothing is
        released.
        """
        if self._asleep:
            return
        self._loop.run(self._release(["kv_cache"] if self._serve_loaded else ["weights", "kv_cache", "cuda_graph"]))
        self._asleep = True

    def wake(self) -> None:
        """Servers take their memory again. A sync before it wakes the weights alone, so that trainer and KV cache
        need not be resident together; without one, the weights come from those kept in host memory."""
        if self._asleep:
            self._loop.run(self._resume(["weights", "kv_cache", "cuda_graph"]))
            self._asleep = False
            self._loop.run(self._refresh())

    async def _release(self, tags: list[str]) -> None:
        self._released = {}

        async def one(replica: Replica) -> None:
            # A server that still computes would end itself here.
            await self._control.post(replica, "/pause_generation", {"mode": "abort"})
            await self._control.post(replica, "/release_memory_occupation", {"tags": tags})
            self._released[replica.incarnation] = tags

        await self._each_up(one)
        if "weights" in tags:
            for replica in self._pool.replicas:
                replica.label = None

    async def _resume(self, tags: list[str]) -> None:
        async def one(replica: Replica) -> None:
            # A server ends itself when asked for what it has not released.
            released = self._released.get(replica.incarnation, [])
            wanted = [tag for tag in tags if tag in released]
            if wanted:
                await self._control.post(replica, "/resume_memory_occupation", {"tags": wanted})
                self._released[replica.incarnation] = [tag for tag in released if tag not in wanted]

        await self._each_up(one)

    async def _refresh(self) -> None:
        await self._each_up(lambda replica: self._control.unpause(replica))
        for replica in self._pool.replicas:
            if self._label is not None and replica.label != self._label:
                self._pool.recover(replica, "woken without a sync")
        await self._pool.settled()

    async def _each_up(self, step: Callable[[Replica], Awaitable[None]]) -> None:
        await self._pool.settled()
        targets = SyncTargets([r for r in self._pool.replicas if r.state in ("ready", "stale")])
        await targets.each(step)
        for replica, reason in targets.failed.items():
            self._pool.recover(replica, reason)

    async def _shutdown(self) -> None:
        await self._transport.close()
        await super()._shutdown()


def _transport_factory(spec: EngineSpec, control: Control) -> Callable[[], Transport]:
    kind = weight_sync(spec.config, broadcasts=True)
    if kind == "tensor":
        return lambda: TensorTransport(control)
    if kind == "disk":
        spool = CheckpointSpool(spec.work_dir / "weights", spec.model_dir)
        return lambda: DiskTransport(control, spool)
    return lambda: DistributedTransport(control, spec.device, spec.config.sync_host)
