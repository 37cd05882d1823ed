"""The vLLM engine: the OpenAI-compatible server, weights by checkpoint directories.

Written against vLLM 0.32, which has run behind it on a CPU (tests/rollout/test_vllm_server.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from real_megatron.errors import ConfigError, EngineError
from real_megatron.rollout.checkpoint_names import check_names
from real_megatron.rollout.engine import EngineSpec, Response, SamplingParams, drain, register_engine
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.control import ControlClient
from real_megatron.rollout.remote.engine import RemoteEngine
from real_megatron.rollout.remote.errors import Retryable, StaleReply, WrongServer
from real_megatron.rollout.remote.labels import incomplete
from real_megatron.rollout.remote.replica import NoCurrentWeights, Replica
from real_megatron.rollout.remote.spool import CheckpointSpool
from real_megatron.rollout.vllm import replies
from real_megatron.rollout.vllm.command import RESERVED_TOKENS, SERVED_NAME, server_command
from real_megatron.rollout.vllm.settings import check_settings
from real_megatron.scores import Branch


@register_engine("vllm", server_package="vllm", reserved_tokens=RESERVED_TOKENS, server_command=server_command)
class VLLMEngine(RemoteEngine):
    """RolloutEngine on vLLM servers, started here or attached to.

    Attached servers must serve the model as `policy`, in development mode (VLLM_SERVER_DEV_MODE=1: pause, reload and
    sleep are development endpoints) and with their default `--logprobs-mode raw_logprobs`; others are refused. vLLM
    then reports log-probabilities at temperature 1, so only temperatures 1 and 0 are taken. Where the model's directory
    holds Mistral's format too (consolidated*.safetensors), they need `--config-format hf --load-format safetensors
    --tokenizer-mode hf`.
    """

    _name = "vllm"
    _path = "/v1/completions"
    _guarded_path = "/v1/models"

    def __init__(self, spec: EngineSpec) -> None:
        """As SGLangEngine. Raises ConfigError for a `rollout.weight_sync` other than auto and disk."""
        if spec.config.weight_sync not in ("auto", "disk"):
            raise ConfigError(
                f"rollout.weight_sync {spec.config.weight_sync}: the vLLM engine syncs by disk: set auto or disk"
            )
        super().__init__(spec)
        self._spool = CheckpointSpool(spec.work_dir / "weights", spec.model_dir)
        self._control = ControlClient(self._http, spec.config.sync_timeout_s)
        self._start()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]:
        if params.temperature not in (0, 1):
            raise ConfigError(
                f"temperature {params.temperature}: vLLM reports log-probabilities at temperature 1 only; set "
                "rollout.temperature or evaluation.temperature to 1 (evaluation also takes 0), or choose another "
                "rollout.engine"
            )
        return replies.generation_body(SERVED_NAME, prompt, params, seed, self._stop_ids)

    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        return replies.parse_generation(reply, params, self._served_version())

    def _together(self, branches: Sequence[Branch]) -> Sequence[Sequence[Branch]]:
        return replies.scored_together(branches)

    def _scoring_body(self, sequence: list[int], branches: Sequence[Branch]) -> dict[str, Any]:
        return replies.scoring_body(SERVED_NAME, sequence, branches)

    def _parse_scoring(self, reply: Any, replica: Replica, branches: Sequence[Branch]) -> list[float]:
        return replies.parse_scoring(reply, branches)

    async def _confirm(self, replica: Replica) -> None:
        # vLLM's replies do not name their weights, but an attached server that was started anew has lost its label. A
        # router does not say which server answered.
        if self._label is None or self._config.router:
            return
        try:
            served = (await self._control.get(replica, "/weight_info"))["weight_version"]
        except EngineError as error:
            raise Retryable(str(error)) from error
        if served != self._label:
            raise StaleReply(f"sampled from weights {served}, current are {self._label}")

    # --- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As RemoteEngine: write the stream as a checkpoint and have every server load it."""
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
            replica.label = None
            self._pool.recover(replica, "weight sync")
        await self._pool.settled()
        await self._require_weights()

    async def _check_settings(self, replica: Replica, timeout_s: float) -> None:
        url = replica.url + "/server_info?config_format=json"
        reply = await self._http.get(url, timeout_s)
        if reply.status == 404:
            raise WrongServer(
                f"{replica.url} is no vLLM server in development mode, in which alone it tells its settings and takes "
                "weights: start it with the environment variable VLLM_SERVER_DEV_MODE=1"
            )
        reply.check(url)
        check_settings(replica.url, reply.json(), synced_tied=self._tied and not self._serve_loaded)

    async def _loaded(self, replica: Replica) -> tuple[str, str]:
        label = str((await self._control.get(replica, "/weight_info"))["weight_version"])
        cards = (await self._control.get(replica, "/v1/models"))["data"]
        roots = [str(card["root"]) for card in cards if card["id"] == SERVED_NAME]
        return (roots or ["no model named policy"])[0], label

    async def _restore(self, replica: Replica) -> None:
        if self._serve_loaded and self._label is None:
            return
        if self._label is None:
            raise NoCurrentWeights("waiting for the next sync")
        served = (await self._control.get(replica, "/weight_info"))["weight_version"]
        if replica.label == self._label == served:
            return
        post = self._control.post
        asleep = self._asleep and not self._serve_loaded
        if asleep:
            await post(replica, "/wake_up?tags=weights", {})
        await post(replica, "/pause?mode=abort", {})
        await post(replica, "/update_weight_version", {"new_version": incomplete(self._label)})
        await self._reload(replica)
        # Refused while requests run, with status 200. Old keys and values would serve the new weights.
        if not (await post(replica, "/reset_prefix_cache", {})).get("success"):
            raise EngineError(f"{replica.url}/reset_prefix_cache: the cache of the old weights was not dropped")
        await post(replica, "/update_weight_version", {"new_version": self._label})
        if not asleep:  # else its KV cache has no memory yet: `wake` lets requests in
            await post(replica, "/resume", {})
        replica.label = self._label

    async def _reload(self, replica: Replica) -> None:
        """Have a server load the spooled checkpoint. After a failure half-way vLLM keeps what it had read, and may
        repeat the failure at each later load: only a new process helps."""
        directory = self._spool.finished
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        try:
            await self._control.post(replica, "/collective_rpc", body, self._control.timeout_s)
        except EngineError as error:
            raise EngineError(
                f"{error}; the server is paused. See that it can read {directory}; if it repeats this failure, start "
                "it anew"
            ) from error

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
                replica.label = None

    def wake(self) -> None:
        """Servers take their memory again. A sync before it has woken the weights alone, so that trainer and KV
        cache need not be resident together; without one, the last checkpoint is loaded again."""
        if not self._asleep:
            return
        updated = self._label is not None and all(r.label == self._label for r in self._pool.replicas)
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
            except EngineError as error:
                self._pool.recover(replica, str(error))
