"""The SGLang engine: requests over HTTP, weights over a process group, shared memory or disk."""

import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from real_megatron.config import RolloutConfig
from real_megatron.rollout.checkpoint_names import check_names
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.remote.buckets import Bucket, bucketed
from real_megatron.rollout.remote.engine import RemoteEngine, drain
from real_megatron.rollout.remote.errors import RolloutError, WeightSyncError
from real_megatron.rollout.remote.labels import Labels, check_loaded
from real_megatron.rollout.remote.replica import NoCurrentWeights, Replica
from real_megatron.rollout.remote.spool import CheckpointSpool
from real_megatron.rollout.sglang import replies
from real_megatron.rollout.sglang.command import local_servers
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.disk_transport import DiskTransport
from real_megatron.rollout.sglang.distributed_transport import DistributedTransport
from real_megatron.rollout.sglang.tensor_transport import TensorTransport
from real_megatron.rollout.sglang.transport import Flight, Transport

logger = logging.getLogger(__name__)


class SGLangEngine(RemoteEngine):
    """RolloutEngine on SGLang servers (0.5.21), started here or attached to.

    Each set of weights has a label that the servers repeat in every reply; a reply from other weights is never
    returned. Sampling is not seeded: SGLang gives all K samples of a request one seed.
    """

    _path = "/generate"

    def __init__(
        self,
        config: RolloutConfig,
        hf_config: PretrainedConfig,
        model_dir: Path,
        work_dir: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        serve_loaded: bool = False,
    ) -> None:
        """
        model_dir: the checkpoint that servers start from; its tensor names are what a sync must deliver
        work_dir: logs, and the checkpoints of a sync by disk
        dtype: of the served weights; floating tensors are cast to it on the way
        serve_loaded: the weights that the servers have loaded are right as they are, as version 0 (to judge or
            evaluate a checkpoint), which attached servers are asked; else nothing is generated before the first
            `update_weights`
        """
        self._labels = Labels()
        self._model_dir = model_dir
        self._dtype = dtype
        self._serve_loaded = serve_loaded
        self._tied = bool(hf_config.tie_word_embeddings)
        self._label: str | None = None
        """Label of the current weights; None when no complete set has been sent."""
        self.version: int | None = 0 if serve_loaded else None
        self._kept: list[Bucket] | None = None
        self._released: dict[tuple[Replica, int], list[str]] = {}
        """What each server process has released; one that was started anew since has not."""
        positions = getattr(hf_config, "max_position_embeddings", None) or sys.maxsize
        context = min(config.max_prompt_tokens + config.max_new_tokens, positions - replies.RESERVED_TOKENS)
        replicas = local_servers(config, model_dir, work_dir / "logs", torch.device(device).type, dtype, context)
        super().__init__(config, replicas, hf_config.vocab_size, context)
        try:
            self._loop.run(self._connect(config, work_dir / "weights", torch.device(device)))
        except BaseException:
            self.close()
            raise

    async def _connect(self, config: RolloutConfig, weights_dir: Path, device: torch.device) -> None:
        self._control = Control(self._http, config.sync_timeout_s)
        self._new_transport = _transport_factory(config, self._control, weights_dir, self._model_dir, device)
        self._transport = self._new_transport()
        await self._pool.start()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]:
        return replies.generation_body(prompt, params)

    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        return replies.parse_generation(reply, params, self._versions(replica), self.version)

    def _scoring_body(self, sequence: list[int], ids: Sequence[int]) -> dict[str, Any]:
        return replies.scoring_body(sequence, ids)

    def _parse_scoring(self, reply: Any, replica: Replica, ids: Sequence[int]) -> list[float]:
        return replies.parse_scoring(reply, ids, self._versions(replica))

    def _versions(self, replica: Replica) -> set[str]:
        # Behind a router any server may have answered.
        answering = self._pool.replicas if self._config.router else [replica]
        return {r.version for r in answering if r.version is not None}

    # --- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send a stream of (Hugging Face name, full tensor) to every server that is up.

        A server that fails on the way drops out, is brought up to date in the background from the weights kept in
        host memory (`rollout.keep_weights`), and takes no request before. The stream is always consumed to its end.

        Raises ValueError when the stream is not the checkpoint's set of tensors, WeightSyncError when no server holds
        the new weights; then nothing is served until another call succeeds.
        """
        stream = iter(tensors)
        self._label, self.version, self._kept = None, None, None
        try:
            self._loop.run(self._pool.settled())
            flight = self._send(stream, self._labels.of(version))
        finally:
            drain(stream)
        self._label, self.version = self._labels.of(version), version
        self._loop.run(self._conclude(flight))

    def _send(self, stream: Iterator[tuple[str, Tensor]], label: str) -> Flight:
        if self._asleep:
            self._loop.run(self._resume(["weights"]))
        flight = self._loop.run(self._open_sync(label))
        keep = self._config.keep_weights and not isinstance(self._transport, DiskTransport)
        kept: list[Bucket] = []
        shapes: dict[str, list[int]] = {}
        for bucket in bucketed(stream, self._config.bucket_mib * 2**20, self._dtype):
            shapes |= zip(bucket.names, bucket.shapes, strict=True)
            if keep:
                kept.append(bucket.to_host())
            if flight.alive:
                self._loop.run(self._transport.send(flight, bucket))
        check_names(self._model_dir, shapes, self._tied)
        self._loop.run(self._close_sync(self._transport, flight, label))
        self._kept = kept if keep else None
        return flight

    async def _open_sync(self, label: str) -> Flight:
        flight = Flight([r for r in self._pool.replicas if r.state in ("ready", "stale")])
        for replica in flight.alive:
            self._pool.set_state(replica, "stale", "weight sync")
        await self._transport.open(flight, label)
        return flight

    async def _close_sync(self, transport: Transport, flight: Flight, label: str) -> None:
        await transport.finish(flight, label)
        await flight.each(lambda replica: self._control.admit(replica, label))

    async def _conclude(self, flight: Flight) -> None:
        for replica in flight.alive:
            replica.version = self._label
            self._pool.set_state(replica, "ready", f"weights {self._label}")
        for replica, reason in flight.failed.items():
            self._pool.recover(replica, f"weight sync failed: {reason}")
        if not await self._pool.any_ready():
            self._label = self.version = None
            reasons = "; ".join(r.describe() for r in self._pool.replicas)
            raise WeightSyncError(f"no rollout server holds the new weights: {reasons}")

    async def _probe(self, replica: Replica, timeout_s: float) -> None:
        # The health check generates a token, for which a server that a failed sync left paused would wait for ever.
        # Its weights are marked as a mixture, and nobody sends it requests.
        url = replica.url + "/continue_generation"
        (await self._http.post(url, {}, timeout_s)).check(url)
        await super()._probe(replica, timeout_s)

    async def _restore(self, replica: Replica) -> None:
        if self._serve_loaded and self._label is None:
            label = await self._control.weight_version(replica)
            if replica.process is None:
                check_loaded(replica.url, await self._control.model_path(replica), label, self._model_dir)
            replica.version = label
            return
        label, kept = self._label, self._kept
        if label is None:
            raise NoCurrentWeights("waiting for the next weight update")
        if replica.version == label and await self._control.weight_version(replica) == label:
            await self._control.unpause(replica)
            return
        if await self._transport.restore(replica, label):
            await self._control.admit(replica, label)
        elif kept is not None:
            transport = self._new_transport()
            flight = Flight([replica])
            try:
                await transport.open(flight, label)
                for bucket in kept:
                    await transport.send(flight, bucket)
                await self._close_sync(transport, flight, label)
            finally:
                await transport.close()
            if flight.failed:
                raise RolloutError(flight.failed[replica])
        else:
            raise NoCurrentWeights("its weights are gone and rollout.keep_weights is off")
        replica.version = label

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
        """Servers take their memory again. An update before it wakes the weights alone, so that trainer and KV cache
        need not be resident together; without one, the weights come from those kept in host memory."""
        if self._asleep:
            self._loop.run(self._resume(["weights", "kv_cache", "cuda_graph"]))
            self._asleep = False
            self._loop.run(self._refresh())

    async def _release(self, parts: list[str]) -> None:
        self._released = {}

        async def one(replica: Replica) -> None:
            # A server that still computes would end itself here.
            await self._control.post(replica, "/pause_generation", {"mode": "abort"})
            await self._control.post(replica, "/release_memory_occupation", {"tags": parts})
            self._released[replica.incarnation] = parts

        await self._each_up(one)
        if "weights" in parts:
            for replica in self._pool.replicas:
                replica.version = None

    async def _resume(self, parts: list[str]) -> None:
        async def one(replica: Replica) -> None:
            # A server ends itself when asked for what it has not released.
            released = self._released.get(replica.incarnation, [])
            wanted = [part for part in parts if part in released]
            if wanted:
                await self._control.post(replica, "/resume_memory_occupation", {"tags": wanted})
                self._released[replica.incarnation] = [part for part in released if part not in wanted]

        await self._each_up(one)

    async def _refresh(self) -> None:
        await self._each_up(lambda replica: self._control.unpause(replica))
        for replica in self._pool.replicas:
            if self._label is not None and replica.version != self._label:
                self._pool.recover(replica, "woken without a weight update")
        await self._pool.settled()

    async def _each_up(self, step: Callable[[Replica], Awaitable[None]]) -> None:
        await self._pool.settled()
        flight = Flight([r for r in self._pool.replicas if r.state in ("ready", "stale")])
        await flight.each(step)
        for replica, reason in flight.failed.items():
            self._pool.recover(replica, reason)

    async def _shutdown(self) -> None:
        if hasattr(self, "_transport"):
            await self._transport.close()
        await super()._shutdown()


def _transport_factory(
    config: RolloutConfig, control: Control, weights_dir: Path, model_dir: Path, device: torch.device
) -> Callable[[], Transport]:
    kind = config.weight_sync
    if kind == "auto":
        kind = "tensor" if config.colocate else "distributed"
    if kind == "tensor":
        return lambda: TensorTransport(control)
    if kind == "disk":
        spool = CheckpointSpool(weights_dir, model_dir)
        return lambda: DiskTransport(control, spool)
    return lambda: DistributedTransport(control, device, config.sync_host)
