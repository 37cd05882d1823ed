"""The vLLM engine: the OpenAI-compatible server, weights by checkpoint directories.

Written against vLLM 0.30's documented endpoints and tested against a local server that speaks them; no vLLM has run
behind it yet.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from real_megatron.config import RolloutConfig
from real_megatron.rollout.checkpoint_names import check_names
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.control import ControlClient
from real_megatron.rollout.remote.engine import RemoteEngine, drain
from real_megatron.rollout.remote.errors import Retryable, RolloutError, StaleReply, WeightSyncError
from real_megatron.rollout.remote.labels import Labels, check_loaded, incomplete
from real_megatron.rollout.remote.process import LAUNCHER, ServerProcess, free_port
from real_megatron.rollout.remote.replica import NoCurrentWeights, Replica
from real_megatron.rollout.remote.spool import CheckpointSpool
from real_megatron.rollout.vllm import replies

_SERVED_NAME = "policy"


class VLLMEngine(RemoteEngine):
    """RolloutEngine on vLLM servers, started here or attached to.

    Attached servers must serve the model as `policy`, in development mode (VLLM_SERVER_DEV_MODE=1: pause, reload and
    sleep are development endpoints) and with their default `--logprobs-mode raw_logprobs`. vLLM then reports
    log-probabilities at temperature 1, so only temperatures 1 and 0 are taken.
    """

    _path = "/v1/completions"

    def __init__(
        self,
        config: RolloutConfig,
        hf_config: PretrainedConfig,
        model_dir: Path,
        work_dir: Path,
        *,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        serve_loaded: bool = False,
    ) -> None:
        """Arguments as of SGLangEngine."""
        if config.weight_sync not in ("auto", "disk"):
            raise ValueError(f"rollout.weight_sync {config.weight_sync}: the vLLM engine syncs by disk: auto or disk")
        self._labels = Labels()
        self._model_dir = model_dir
        self._dtype = dtype
        self._serve_loaded = serve_loaded
        self._tied = bool(hf_config.tie_word_embeddings)
        self._label: str | None = None
        self.version: int | None = 0 if serve_loaded else None
        self._spool = CheckpointSpool(work_dir / "weights", model_dir)
        positions = getattr(hf_config, "max_position_embeddings", None) or sys.maxsize
        context = min(config.max_prompt_tokens + config.max_new_tokens, positions)
        replicas = _replicas(config, model_dir, work_dir / "logs", dtype, context)
        super().__init__(config, replicas, hf_config.vocab_size, context)
        self._control = ControlClient(self._http, config.sync_timeout_s)
        try:
            self._loop.run(self._pool.start())
        except BaseException:
            self.close()
            raise

    # --- requests ---------------------------------------------------------------------------------------------------

    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]:
        if params.temperature not in (0, 1):
            raise ValueError(
                f"temperature {params.temperature}: vLLM reports log-probabilities at temperature 1 only; use "
                "temperature 1 (or 0), or another engine"
            )
        return replies.generation_body(_SERVED_NAME, prompt, params, seed)

    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        return replies.parse_generation(reply, params, self.version)

    def _scoring_body(self, sequence: list[int], ids: Sequence[int]) -> dict[str, Any]:
        params = SamplingParams(max_new_tokens=1, watch_ids=tuple(ids))
        return replies.generation_body(_SERVED_NAME, sequence, params, None)

    def _parse_scoring(self, reply: Any, replica: Replica, ids: Sequence[int]) -> list[float]:
        return replies.parse_scoring(reply, ids)

    async def _confirm(self, replica: Replica) -> None:
        # vLLM's replies do not name their weights, but a server that was started anew by somebody else has lost its
        # label. Behind a router nobody says which server it was.
        if self._label is None or self._config.router:
            return
        try:
            served = (await self._control.get(replica, "/weight_info"))["weight_version"]
        except RolloutError as error:
            raise Retryable(str(error)) from error
        if served != self._label:
            raise StaleReply(f"sampled from weights {served}, current are {self._label}")

    # --- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the stream as a checkpoint and have every server load it. Errors as of SGLangEngine."""
        stream = iter(tensors)
        label = self._labels.of(version)
        self._label, self.version = None, None
        self._loop.run(self._pool.settled())
        shapes: dict[str, list[int]] = {}
        try:
            self._spool.open(label)
            for bucket in bucketed(stream, self._config.bucket_mib * 2**20, self._dtype):
                shapes |= zip(bucket.names, bucket.shapes, strict=True)
                self._spool.add(bucket)
        finally:
            drain(stream)
        check_names(self._model_dir, shapes, self._tied)
        self._spool.finish(label)
        self._label, self.version = label, version
        self._loop.run(self._distribute())
        self._spool.discard_others()

    async def _distribute(self) -> None:
        for replica in self._pool.replicas:
            replica.version = None
            self._pool.recover(replica, "weight sync")
        await self._pool.settled()
        if not await self._pool.any_ready():
            self._label = self.version = None
            reasons = "; ".join(r.describe() for r in self._pool.replicas)
            raise WeightSyncError(f"no rollout server holds the new weights: {reasons}")

    async def _restore(self, replica: Replica) -> None:
        if self._serve_loaded and self._label is None:
            if replica.process is None:
                label = str((await self._control.get(replica, "/weight_info"))["weight_version"])
                cards = (await self._control.get(replica, "/v1/models"))["data"]
                roots = [str(card["root"]) for card in cards if card["id"] == _SERVED_NAME]
                check_loaded(replica.url, (roots or ["no model named policy"])[0], label, self._model_dir)
            return
        if self._label is None:
            raise NoCurrentWeights("waiting for the next weight update")
        served = (await self._control.get(replica, "/weight_info"))["weight_version"]
        if replica.version == self._label == served:
            return
        post = self._control.post
        if self._asleep and not self._serve_loaded:
            await post(replica, "/wake_up?tags=weights", {})
        await post(replica, "/pause?mode=abort", {})
        await post(replica, "/update_weight_version", {"new_version": incomplete(self._label)})
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._spool.finished)}}
        await post(replica, "/collective_rpc", body, self._control.timeout_s)
        await post(replica, "/reset_prefix_cache", {})
        await post(replica, "/update_weight_version", {"new_version": self._label})
        await post(replica, "/resume", {})
        replica.version = self._label

    # --- memory -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Servers discard weights and KV cache (level 2), or, when they serve what they loaded, keep the weights in
        host memory (level 1)."""
        if self._asleep:
            return
        self._loop.run(self._post_each("/pause?mode=abort", f"/sleep?level={1 if self._serve_loaded else 2}"))
        self._asleep = True
        if not self._serve_loaded:
            for replica in self._pool.replicas:
                replica.version = None

    def wake(self) -> None:
        """Servers take their memory again. An update before it has woken the weights alone, so that trainer and KV
        cache need not be resident together; without one, the last checkpoint is loaded again."""
        if not self._asleep:
            return
        updated = self._label is not None and all(r.version == self._label for r in self._pool.replicas)
        self._loop.run(self._post_each("/wake_up?tags=kv_cache" if updated else "/wake_up", "/resume"))
        self._asleep = False
        if self._label is not None and not updated:
            self._loop.run(self._distribute())

    async def _post_each(self, *paths: str) -> None:
        await self._pool.settled()
        for replica in self._pool.replicas:
            try:
                for path in paths:
                    await self._control.post(replica, path, {}, self._control.timeout_s)
            except RolloutError as error:
                self._pool.recover(replica, str(error))


def _replicas(config: RolloutConfig, model_dir: Path, log_dir: Path, dtype: torch.dtype, context: int) -> list[Replica]:
    """The servers to attach to (`rollout.servers`), or processes to start, not started yet."""
    if config.servers:
        return [Replica(url) for url in config.servers]
    replicas = []
    for index in range(config.replicas):
        port = config.port + index if config.port else free_port()
        command = server_command(config, model_dir, port, dtype, context)
        first = config.first_gpu + index * config.tensor
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # rollout.first_gpu counts what this process sees
        names = visible.split(",") if visible else [str(gpu) for gpu in range(first + config.tensor)]
        gpus = ",".join(names[first : first + config.tensor])
        environment = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": gpus}
        replicas.append(
            Replica(f"http://127.0.0.1:{port}", ServerProcess(command, log_dir, f"vllm-{index}", environment))
        )
    return replicas


def server_command(config: RolloutConfig, model_dir: Path, port: int, dtype: torch.dtype, context: int) -> list[str]:
    """Arguments of one local server; `rollout.server_args` come last and win."""
    command = [config.python or sys.executable, str(LAUNCHER), "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_dir), "--served-model-name", _SERVED_NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", str(dtype).removeprefix("torch.")]
    # One more than the longest sequence: scoring generates a token that nobody reads.
    command += ["--max-model-len", str(context + 1), "--tensor-parallel-size", str(config.tensor)]
    if config.colocate:
        command += ["--enable-sleep-mode"]
    return command + config.server_args
