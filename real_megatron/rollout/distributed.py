"""One rollout engine for a trainer of many ranks."""

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.engine import BadResponse, Response, RolloutEngine, SamplingParams, drain
from real_megatron.scores import Branch

T = TypeVar("T")

Serve = Callable[[RolloutEngine, list[int]], list[T]]
"""Asks an engine of one rank for what the sequences of these indices need, in the call whose lengths were given: one
item for each. Its PromptRefused and BadResponse count in these indices, as those of the engine do."""


def share(
    engine: RolloutEngine,
    lengths: Sequence[int],
    serve: Serve[T],
    encode: Callable[[list[T]], Tensor],
    decode: Callable[[Tensor], list[T]],
) -> list[T]:
    """An item for each sequence, on every rank of the engine: see `DistributedRollout.share`. An engine of one rank
    serves them all."""
    if isinstance(engine, DistributedRollout):
        return engine.share(lengths, serve, encode, decode)
    return serve(engine, list(range(len(lengths))))


def collect(engine: RolloutEngine, lengths: Sequence[int], serve: Serve[T]) -> list[T]:
    """An item for each sequence, on the engine's first rank: see `DistributedRollout.collect`. An engine of one rank
    serves them all."""
    if isinstance(engine, DistributedRollout):
        return engine.collect(lengths, serve)
    return serve(engine, list(range(len(lengths))))


class FollowerEngine:
    """The engine of ranks that do not own the servers: takes part in the weight export, leaves the rest to rank 0.

    It serves nothing itself: only DistributedRollout uses it.
    """

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        raise AssertionError("a FollowerEngine serves nothing: rank 0 generates for all ranks")

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        raise AssertionError("a FollowerEngine serves nothing: rank 0 scores for all ranks")

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Iterate the stream: the export is collective, though it may yield nothing here (rank 0 alone needs it)."""
        drain(tensors)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def health(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Outcome:
    """What came of an action on one rank, beside its result."""

    size: int = 0
    """Bytes of its message to other ranks."""
    refused: PromptRefused | None = None
    bad: BadResponse | None = None
    failure: str | None = None
    """Any other error, as text: it may not be picklable."""


class DistributedRollout:
    """RolloutEngine over all ranks of a group. Every method is collective: all ranks call it, with equal arguments.

    With an engine on each rank (embedded), each rank serves some of the prompts; with FollowerEngines on all ranks but
    the first (servers), the first serves all of them. `generate` and `branch_logprobs` return the identical list on
    every rank. `share` and `collect` let the rank that has served a prompt make of the responses what is asked for, so
    that no more than that travels: once to each rank, or to the first one alone.

    A PromptRefused or BadResponse of any rank is raised on all of them, with the prompt's index in the whole call,
    unless a rank fails in another way. Such a rank raises its own error, the others an EngineError that quotes it.

    group: carries tensors of the host, so gloo. A group of its own when generation overlaps training
        (`rollout.staleness`), since collectives of two threads must not mix.
    """

    def __init__(self, engine: RolloutEngine, group: dist.ProcessGroup | None = None) -> None:
        self._engine = engine
        self._group = group
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        followers = self._gather(isinstance(engine, FollowerEngine))
        if any(followers) and followers != [False] + [True] * (self._size - 1):
            raise ValueError("FollowerEngines belong on every rank but the first")
        self._owned = any(followers)

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        def serve(engine: RolloutEngine, indices: list[int]) -> list[list[Response]]:
            own_seeds = None if seeds is None else [seeds[i] for i in indices]
            return engine.generate([prompts[i] for i in indices], params, own_seeds)

        return self.share([len(prompt) for prompt in prompts], serve, _pickled, _unpickled)

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        def serve(engine: RolloutEngine, indices: list[int]) -> list[list[float]]:
            rows: list[list[float]] = engine.branch_logprobs([sequences[i] for i in indices], branches).tolist()
            return rows

        rows = self.share([len(sequence) for sequence in sequences], serve, _pickled, _unpickled)
        return torch.tensor(rows).reshape(len(sequences), sum(len(branch.ids) for branch in branches))

    def share(
        self,
        lengths: Sequence[int],
        serve: Serve[T],
        encode: Callable[[list[T]], Tensor],
        decode: Callable[[Tensor], list[T]],
    ) -> list[T]:
        """Let each rank `serve` its sequences; returns the items of all, in order, on every rank.

        lengths: of the sequences: a rank's share has short and long ones
        encode: a rank's items as a message, uint8 [bytes], which it broadcasts; the rank itself keeps its items
        decode: the items, from another rank's message
        """
        shares = self._shares(lengths)
        own, message, sizes = self._served(shares[self._rank], serve, encode)
        results: dict[int, T] = {}
        for rank, indices in enumerate(shares):
            if not sizes[rank]:
                continue
            received = message if rank == self._rank else torch.empty(sizes[rank], dtype=torch.uint8)
            dist.broadcast(received, group_src=rank, group=self._group)
            items = own if rank == self._rank else decode(received)
            results.update(zip(indices, items, strict=True))
        return [results[index] for index in range(len(lengths))]

    def collect(self, lengths: Sequence[int], serve: Serve[T]) -> list[T]:
        """As `share`, but to the first rank alone, as pickled objects; the other ranks return an empty list."""
        shares = self._shares(lengths)
        own, message, sizes = self._served(shares[self._rank], serve, _pickled if self._rank else _nothing)
        if self._rank:
            if sizes[self._rank]:
                dist.send(message, group_dst=0, group=self._group)
            return []
        results: dict[int, T] = {}
        for rank, indices in enumerate(shares):
            items = own
            if rank:
                if not sizes[rank]:
                    continue
                received = torch.empty(sizes[rank], dtype=torch.uint8)
                dist.recv(received, group_src=rank, group=self._group)
                items = _unpickled(received)
            results.update(zip(indices, items, strict=True))
        return [results[index] for index in range(len(lengths))]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        stream = iter(tensors)

        def sync() -> None:
            try:
                self._engine.update_weights(stream, version)
            finally:
                # The other ranks are still in the collective export.
                drain(stream)

        self._agreed(sync)

    def sleep(self) -> None:
        self._agreed(self._engine.sleep)

    def wake(self) -> None:
        self._agreed(self._engine.wake)

    def health(self) -> None:
        self._agreed(self._engine.health)

    def close(self) -> None:
        """Not collective, so that a rank in trouble can always end its servers."""
        self._engine.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the sequences that each rank serves."""
        if self._owned:
            return [list(range(len(lengths))), *([] for _ in range(self._size - 1))]
        # Every n-th in order of length: equal work, and batches of similar lengths.
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return [order[rank :: self._size] for rank in range(self._size)]

    def _served(
        self, indices: list[int], serve: Serve[T], encode: Callable[[list[T]], Tensor]
    ) -> tuple[list[T], Tensor, list[int]]:
        """This rank's items, those of `indices`, and its message, and the bytes of every rank's."""
        own: list[T] = []
        message = _nothing(own)

        def action() -> int:
            nonlocal own, message
            if indices:
                try:
                    own = serve(self._engine, indices)
                except PromptRefused as refusal:
                    raise PromptRefused(indices[refusal.index], str(refusal)) from refusal
                except BadResponse as bad:
                    raise bad.at(indices[bad.index]) from bad
                message = encode(own)
            return message.numel()

        sizes = self._agreed(action)
        return own, message, sizes

    def _agreed(self, action: Callable[[], int | None]) -> list[int]:
        """What the action returned on every rank, 0 for None; or an error on all ranks when one had an error."""
        error: Exception | None = None
        own = _Outcome()
        try:
            own.size = action() or 0
        except PromptRefused as refused:
            own.refused = refused
        except BadResponse as bad:
            own.bad = bad
        except Exception as failure:
            error = failure
            own.failure = f"{type(failure).__name__}: {failure}"
        outcomes = self._gather(own)
        if error is not None:
            raise error
        failures = [f"rank {rank}: {outcome.failure}" for rank, outcome in enumerate(outcomes) if outcome.failure]
        if failures:
            raise EngineError("the rollout engine failed on another rank: " + "; ".join(failures))
        for errors in ([outcome.bad for outcome in outcomes], [outcome.refused for outcome in outcomes]):
            if found := [each for each in errors if each is not None]:
                raise min(found, key=lambda each: each.index)
        return [outcome.size for outcome in outcomes]

    def _gather(self, value: T) -> list[T]:
        """Every rank's value: small, since each rank gets a message of the largest one's size from each."""
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _pickled(items: list[Any]) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8)


def _unpickled(message: Tensor) -> list[Any]:
    """What another rank of this run has pickled."""
    items: list[Any] = pickle.loads(message.numpy().data)
    return items


def _nothing(items: list[Any]) -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
