"""One rollout engine for a trainer of many ranks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.engine import Response, RolloutEngine, SamplingParams, drain

T = TypeVar("T")


class FollowerEngine:
    """The engine of ranks that do not own the servers: takes part in the weight export, leaves the rest to rank 0.

    It serves nothing itself: only DistributedRollout uses it.
    """

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        raise AssertionError("a FollowerEngine serves nothing: rank 0 generates for all ranks")

    def next_token_logprobs(self, sequences: Sequence[list[int]], ids: Sequence[int]) -> Tensor:
        raise AssertionError("a FollowerEngine serves nothing: rank 0 scores for all ranks")

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Iterate the stream: the export is collective, though it may yield nothing here (rank 0 alone needs it)."""
        drain(tensors)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def health(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Outcome(Generic[T]):
    """What came of an action on one rank."""

    result: list[T]
    """One item; none after an error."""
    refused: PromptRefused | None = None
    failure: str | None = None
    """Any other error, as text: it may not be picklable."""


class DistributedRollout:
    """RolloutEngine over all ranks of a group. Every method is collective: all ranks call it, with equal arguments.

    With an engine on each rank (embedded), each rank serves some of the prompts; with FollowerEngines on all ranks but
    the first (servers), the first serves all of them. Either way every rank returns the identical list.

    A PromptRefused of any rank is raised on all of them, with the prompt's index in the whole call, unless a rank fails
    in another way. Such a rank raises its own error, the others an EngineError that quotes it.

    group: carries pickled results: gloo serves best. A group of its own when generation overlaps training
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
        def serve(indices: list[int]) -> list[list[Response]]:
            own_seeds = None if seeds is None else [seeds[i] for i in indices]
            return self._engine.generate([prompts[i] for i in indices], params, own_seeds)

        return self._distribute([len(prompt) for prompt in prompts], serve)

    def next_token_logprobs(self, sequences: Sequence[list[int]], ids: Sequence[int]) -> Tensor:
        rows = self._distribute(
            [len(sequence) for sequence in sequences],
            lambda indices: list(self._engine.next_token_logprobs([sequences[i] for i in indices], ids)),
        )
        return torch.stack(rows) if rows else torch.empty(0, len(ids))

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

    def _distribute(self, lengths: list[int], serve: Callable[[list[int]], list[T]]) -> list[T]:
        """`serve` the indices of this rank's sequences, return the results of all in order."""
        if self._owned:
            indices = list(range(len(lengths))) if self._rank == 0 else []
        else:
            # Every n-th in order of length: equal work, and batches of similar lengths.
            indices = sorted(range(len(lengths)), key=lambda i: lengths[i])[self._rank :: self._size]

        def serve_own() -> list[tuple[int, T]]:
            try:
                return list(zip(indices, serve(indices), strict=True)) if indices else []
            except PromptRefused as error:
                raise PromptRefused(indices[error.index], str(error)) from error

        results = dict(pair for pairs in self._agreed(serve_own) for pair in pairs)
        return [results[index] for index in range(len(lengths))]

    def _agreed(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result, or an error on all ranks when one had an error."""
        error: Exception | None = None
        own: _Outcome[T] = _Outcome([])
        try:
            own.result.append(action())
        except PromptRefused as refused:
            own.refused = refused
        except Exception as failure:
            error = failure
            own.failure = f"{type(failure).__name__}: {failure}"
        outcomes = self._gather(own)
        if error is not None:
            raise error
        failures = [f"rank {rank}: {outcome.failure}" for rank, outcome in enumerate(outcomes) if outcome.failure]
        if failures:
            raise EngineError("the rollout engine failed on another rank: " + "; ".join(failures))
        refusals = [outcome.refused for outcome in outcomes if outcome.refused is not None]
        if refusals:
            raise min(refusals, key=lambda refused: refused.index)
        return [result for outcome in outcomes for result in outcome.result]

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values
