"""What engines behind HTTP have in common: many requests at once, each answered once, in order or as they finish."""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from real_megatron.config import RolloutConfig
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.remote.client import RequestClient
from real_megatron.rollout.remote.errors import RolloutError
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.loop import LoopThread
from real_megatron.rollout.remote.replica import Replica, ReplicaPool


class RemoteEngine(ABC):
    """RolloutEngine over one or more servers. Subclasses know the server's API and how weights reach it."""

    _path: str
    """Where generation requests go."""

    def __init__(self, config: RolloutConfig, replicas: list[Replica], vocab_size: int, max_tokens: int) -> None:
        """
        vocab_size: ids at or above it never leave this process (an out-of-range id can end a server)
        max_tokens: longest prompt and response together
        """
        self._config = config
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._asleep = False
        self._closing = threading.Lock()
        self._loop = LoopThread(type(self).__name__)
        self._loop.run(self._open(replicas))

    async def _open(self, replicas: list[Replica]) -> None:
        config = self._config
        http = self._http = Http()
        self._pool = ReplicaPool(
            replicas,
            concurrency=config.concurrency,
            start_timeout_s=config.start_timeout_s,
            restarts=config.restarts,
            probe=self._probe,
            restore=self._restore,
        )
        self._client = RequestClient(http, self._pool, config.timeout_s, config.attempts, config.router, self._confirm)

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @abstractmethod
    def _generation_body(self, prompt: list[int], params: SamplingParams, seed: int | None) -> dict[str, Any]: ...

    @abstractmethod
    def _parse_generation(self, reply: Any, replica: Replica, params: SamplingParams) -> list[Response]:
        """Raises Retryable unless the reply holds exactly `params.n` whole responses from the current weights."""

    @abstractmethod
    def _scoring_body(self, sequence: list[int], ids: Sequence[int]) -> dict[str, Any]: ...

    @abstractmethod
    def _parse_scoring(self, reply: Any, replica: Replica, ids: Sequence[int]) -> list[float]: ...

    @abstractmethod
    async def _restore(self, replica: Replica) -> None:
        """Bring a server that is up to the current weights (see ReplicaPool)."""

    async def _confirm(self, replica: Replica) -> None:
        """Called after each good reply: raise StaleReply when it came from other weights without saying so."""
        return

    async def _shutdown(self) -> None:
        """End the servers that were started here, and the connections."""
        await self._pool.close()
        await self._http.close()

    async def _probe(self, replica: Replica, timeout_s: float) -> None:
        """Raise Unreachable unless the server answers its health check."""
        url = replica.url + "/health"
        (await self._http.get(url, timeout_s)).check(url)

    # --- the protocol -----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        groups: list[list[Response] | None] = [None] * len(prompts)
        for index, group in self.generate_stream(prompts, params, seeds):
            groups[index] = group
        return groups

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

    def next_token_logprobs(self, sequences: Sequence[list[int]], ids: Sequence[int]) -> Tensor:
        self._check(sequences, 0)
        if any(not 0 <= i < self._vocab_size for i in ids):
            raise ValueError(f"token ids {list(ids)} are not all in the vocabulary of {self._vocab_size}")

        async def one(index: int) -> list[float]:
            return await self._client.request(
                f"scoring of sequence {index}",
                self._path,
                self._scoring_body(sequences[index], ids),
                lambda reply, replica: self._parse_scoring(reply, replica, ids),
            )

        result = torch.empty(len(sequences), len(ids))
        for index, values in self._each(len(sequences), one):
            result[index] = torch.tensor(values)
        return result

    def health(self) -> None:
        if self._asleep:
            raise RuntimeError("the engine sleeps: call wake() first")
        if not self._loop.run(self._pool.any_ready()):
            raise RolloutError("no rollout server can serve: " + "; ".join(r.describe() for r in self._pool.replicas))

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

    # --- inside -----------------------------------------------------------------------------------------------------

    def _check(self, sequences: Sequence[list[int]], more: int) -> None:
        if self._asleep:
            raise RuntimeError("the engine sleeps: call wake() first")
        for i, sequence in enumerate(sequences):
            if not sequence:
                raise ValueError(f"sequence {i} is empty")
            if min(sequence) < 0 or max(sequence) >= self._vocab_size:
                raise ValueError(f"sequence {i} has token ids outside the vocabulary of {self._vocab_size}")
            if len(sequence) + more > self._max_tokens:
                raise ValueError(
                    f"sequence {i} has {len(sequence)} tokens; with {more} new ones it exceeds the {self._max_tokens} "
                    "that the servers are sized for: rollout.max_prompt_tokens + rollout.max_new_tokens"
                )

    def _each(self, count: int, one) -> Iterator[tuple[int, Any]]:
        """Run `one(0..count-1)` with as many at a time as the servers take; yield (index, result) as they finish."""
        finished: queue.SimpleQueue = queue.SimpleQueue()
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
        running.add_done_callback(lambda _: finished.put(RolloutError("the engine was closed during the request")))
        try:
            for _ in range(count):
                item = finished.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            running.cancel()


def drain(stream: Iterable[Any]) -> None:
    """Consume what is left of a stream. A collective export must be iterated to its end on every rank."""
    for _ in stream:
        pass
