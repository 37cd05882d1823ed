"""What engines behind HTTP have in common: many requests at once, each answered once, in order or as they finish."""

import asyncio
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from real_megatron import progress
from real_megatron.errors import EngineError, PromptRefused
from real_megatron.hf.checkpoint import check_servers_read_the_same
from real_megatron.hf.rotary import longest_sequence
from real_megatron.rollout.engine import (
    ENGINES,
    EngineKind,
    EngineSpec,
    Response,
    SamplingParams,
    WeightSyncError,
    check_ids,
)
from real_megatron.rollout.remote.client import RequestClient
from real_megatron.rollout.remote.errors import Retryable, Unreachable, WrongServer
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.labels import Labels, check_loaded
from real_megatron.rollout.remote.loop import LoopThread
from real_megatron.rollout.remote.replica import Replica, ReplicaPool
from real_megatron.rollout.remote.rotary import check_served_rotary
from real_megatron.rollout.remote.servers import api_key, configured_servers, port_taken
from real_megatron.scores import Branch

T = TypeVar("T")


def served_tokens(spec: EngineSpec, kind: EngineKind) -> int:
    """The longest prompt and response together that a server is started for: what is asked for, or what the model has
    positions for. Raises CheckpointError."""
    positions = longest_sequence(spec.hf_config()) or sys.maxsize
    return min(spec.max_tokens, positions - kind.reserved_tokens)


class RemoteEngine(ABC):
    """RolloutEngine over one or more servers. Subclasses know the server's API and how weights reach it."""

    _name: str
    """Of log files, and of `rollout.engine`."""
    _path: str
    """Where generation requests go."""
    _guarded_path: str
    """A GET request that a server with an API key answers only with it."""

    def __init__(self, spec: EngineSpec) -> None:
        """Everything but what weight syncs need: a subclass adds that, then calls `_start`.

        Raises CheckpointError where servers would load other files of the checkpoint than this package, EngineError
        where they would rotate queries and keys otherwise, ConfigError as `api_key`.
        """
        if spec.serve_loaded or not spec.config.servers:
            check_servers_read_the_same(spec.model_dir)
        hf_config = spec.hf_config()
        check_served_rotary(self._name, hf_config)
        self._config = spec.config
        self._model_dir = spec.model_dir
        self._dtype = spec.dtype
        self._serve_loaded = spec.serve_loaded
        self._tied = bool(hf_config.tie_word_embeddings)
        self._tokenizer = spec.tokenizer
        self._vocab_size: int = hf_config.vocab_size
        """Ids at or above it never leave this process: an out-of-range id can end a server."""
        kind = ENGINES.find(self._name)
        self._max_tokens = served_tokens(spec, kind)
        """Longest prompt and response together."""
        self._stop_ids = spec.stop_ids()
        """Named in every request: a server's own list may be shorter."""
        self._labels = Labels()
        self._label: str | None = None
        """Label of the current weights; None when no complete set has been sent."""
        self.version: int | None = 0 if spec.serve_loaded else None
        """Version of the current weights; None before the first sync and after a failed one."""
        self._asleep = False
        self._closing = threading.Lock()
        self.api_key = api_key(spec.config)
        """Of its servers, for whoever asks them directly: not for logs or files."""
        command = kind.server_command
        assert command is not None, f"{self._name} is registered without server_command"
        replicas = configured_servers(
            spec.config,
            self._name,
            spec.work_dir / "logs",
            self.api_key,
            lambda index, port: command(spec, index, port, self._max_tokens),
        )
        self._loop = LoopThread(type(self).__name__)
        self._loop.run(self._open(replicas))

    async def _open(self, replicas: list[Replica]) -> None:
        config = self._config
        http = self._http = Http(self.api_key)
        self._pool = ReplicaPool(
            replicas,
            concurrency=config.concurrency,
            start_timeout_s=config.start_timeout_s,
            restarts=config.restarts,
            port_taken=lambda port: port_taken(config, port),
            probe=self._probe,
            restore=self._restore,
        )
        self._client = RequestClient(http, self._pool, config.timeout_s, config.attempts, config.router, self._confirm)

    def _start(self) -> None:
        """Start the servers, or attach to them, and wait until all are up. An engine that cannot is closed."""
        try:
            self._loop.run(self._pool.start())
        except BaseException:
            self.close()
            raise

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @abstractmethod
    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]:
        """Raises ConfigError for parameters that the server does not take."""

    @abstractmethod
    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        """Raises Retryable unless the reply holds exactly `params.n` whole responses from the current weights."""

    @abstractmethod
    def _scoring_body(self, sequence: list[int], branches: Sequence[Branch]) -> dict[str, Any]: ...

    @abstractmethod
    def _parse_scoring(self, reply: Any, replica: Replica, branches: Sequence[Branch]) -> list[float]: ...

    @abstractmethod
    async def _loaded(self, replica: Replica) -> tuple[str, str]:
        """The checkpoint that a server says it has loaded, and the label of its weights."""

    @abstractmethod
    async def _restore(self, replica: Replica) -> None:
        """Bring a server that is up to the current weights (see ReplicaPool)."""

    @abstractmethod
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send a stream of (Hugging Face name, full tensor) to every server that is up, cast to `spec.dtype`.

        The stream is always consumed to its end. Raises EngineError when it is not the checkpoint's set of tensors,
        WeightSyncError when no server holds the new weights; then nothing is served until another call succeeds.
        """

    @abstractmethod
    def sleep(self) -> None: ...

    @abstractmethod
    def wake(self) -> None: ...

    async def _confirm(self, replica: Replica) -> None:
        """Called after each good reply: raise StaleReply when it came from other weights without saying so."""
        return

    async def _check_settings(self, replica: Replica, timeout_s: float) -> None:
        """Raise WrongServer where a server that is up runs with settings that it must not have."""
        return

    async def _shutdown(self) -> None:
        """End the servers that were started here, and the connections."""
        await self._pool.close()
        await self._http.close()

    async def _check_health(self, replica: Replica, timeout_s: float) -> None:
        """Raise Unreachable unless the server answers its health check."""
        url = replica.url + "/health"
        (await self._http.get(url, timeout_s)).check(url)

    async def _probe(self, replica: Replica, timeout_s: float) -> None:
        # Before any request that could change a server, which may be another's.
        if replica.known != replica.incarnation:
            await self._check_identity(replica, timeout_s)
            replica.known = replica.incarnation
        await self._check_health(replica, timeout_s)
        await self._check_router(timeout_s)

    async def _check_router(self, timeout_s: float) -> None:
        """Raise Unreachable while the router, if there is one, does not answer or knows of no server that is up."""
        if self._config.router:
            # sglang-router's; another's that has no such path is up when it says so.
            reply = await self._http.get(self._config.router.rstrip("/") + "/readiness", timeout_s)
            if reply.status >= 500:
                raise Unreachable(f"the router {self._config.router}: {reply.describe()}")

    async def _check_identity(self, replica: Replica, timeout_s: float) -> None:
        """Raise WrongServer unless it is the server asked for, with the checkpoint that it must have loaded.

        A local one is known by its API key: it takes this engine's, and refuses requests without. Another's, that has
        taken the port while ours was loading the model, does one or the other differently.
        """
        url = replica.url + self._guarded_path
        local = replica.process is not None
        another = WrongServer(
            f"another process serves at {replica.url}, where a server of this run was started: end it, or set "
            "rollout.port to a free port"
        )
        if local and not (await self._http.get(url, timeout_s, anonymous=True)).unauthorized:
            raise another
        reply = await self._http.get(url, timeout_s)
        if local and reply.unauthorized:
            raise another
        reply.check(url)
        await self._check_settings(replica, timeout_s)
        if local or (self._serve_loaded and self._label is None):
            check_loaded(replica.url, *await self._loaded(replica), self._model_dir)

    # --- the protocol -----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        groups = dict(self.generate_stream(prompts, params, seeds))
        return [groups[index] for index in range(len(prompts))]

    def generate_stream(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Response]]]:
        """(index of the prompt, its responses) as they finish: each prompt once, or one error."""
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
        self._check(prompts, params.max_new_tokens)

        async def one(index: int) -> list[Response]:
            body = self._generation_body(prompts[index], params, None if seeds is None else seeds[index])
            return await self._client.request(
                f"generation for prompt {index}",
                self._path,
                body,
                lambda reply, replica: self._parse_generation(reply, replica, params),
            )

        yield from self._each(len(prompts), one)

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        self._check(sequences, max((len(branch.path) for branch in branches), default=0))
        named = [i for branch in branches for i in (*branch.path, *branch.ids)]
        if any(not 0 <= i < self._vocab_size for i in named):
            raise ValueError(f"token ids {named} are not all in the vocabulary of {self._vocab_size}")

        async def some(index: int, asked: Sequence[Branch]) -> list[float]:
            return await self._client.request(
                f"scoring of sequence {index}",
                self._path,
                self._scoring_body(sequences[index], asked),
                lambda reply, replica: self._parse_scoring(reply, replica, asked),
            )

        async def one(index: int) -> list[float]:
            return [value for asked in self._together(branches) for value in await some(index, asked)]

        result = torch.empty(len(sequences), sum(len(branch.ids) for branch in branches))
        for index, values in self._each(len(sequences), one):
            result[index] = torch.tensor(values)
        return result

    def _together(self, branches: Sequence[Branch]) -> Sequence[Sequence[Branch]]:
        """The branches as those of one request each: all in one, unless a server takes fewer."""
        return [branches]

    def health(self) -> None:
        self._check_awake()
        if not self._loop.run(self._pool.any_ready()):
            raise EngineError(f"no rollout server can serve: {self._pool.describe()}")

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers, started or attached."""
        return [replica.url for replica in self._pool.replicas]

    def close(self) -> None:
        """End the servers that were started here; attached ones go on."""
        with self._closing:  # two threads may close: the second finds nothing left to do
            if self._loop.alive:
                self._loop.run(self._shutdown())
            self._loop.close()

    # --- for subclasses ---------------------------------------------------------------------------------------------

    def _served_version(self) -> int:
        """The version of the current weights, for a reply. Raises Retryable while they are replaced."""
        if self.version is None:
            raise Retryable("the weights are being replaced")
        return self.version

    async def _require_weights(self) -> None:
        """Wait until a server holds the weights just sent. Raises WeightSyncError when none will."""
        if not await self._pool.any_ready():
            self._label = self.version = None
            raise WeightSyncError(f"no rollout server holds the new weights: {self._pool.describe()}")

    # --- inside -----------------------------------------------------------------------------------------------------

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineError("the engine sleeps: call wake() first")

    def _check(self, sequences: Sequence[list[int]], more: int) -> None:
        self._check_awake()
        check_ids(sequences, self._vocab_size, self._tokenizer)
        for i, sequence in enumerate(sequences):
            if len(sequence) + more > self._max_tokens:
                raise PromptRefused(
                    i,
                    f"the sequence has {len(sequence)} tokens; with {more} new ones it exceeds the {self._max_tokens} "
                    "that the servers are sized for: data.max_prompt_tokens + data.max_response_tokens, or the model's "
                    "own limit",
                )

    def _each(self, count: int, one: Callable[[int], Coroutine[Any, Any, T]]) -> Iterator[tuple[int, T]]:
        """Run `one(0..count-1)` with as many at a time as the servers take; yield (index, result) as they finish."""
        finished: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()
        waiting = iter(range(count))

        async def worker() -> None:
            for index in waiting:
                finished.put((index, await one(index)))

        async def all_workers() -> None:
            workers = min(count, self._config.concurrency * len(self._pool.replicas))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(worker())
            except BaseExceptionGroup as errors:
                finished.put(errors.exceptions[0])

        running = self._loop.submit(all_workers())
        # Behind all results, however it ends: read only when some are missing.
        running.add_done_callback(lambda _: finished.put(EngineError("the engine was closed during the request")))
        try:
            for _ in range(count):
                item = finished.get()
                if isinstance(item, BaseException):
                    raise item
                progress.mark()
                yield item
        finally:
            running.cancel()
