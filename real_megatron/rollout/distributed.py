"""One rollout engine for a trainer of many ranks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.rollout.engine import Response, RolloutEngine, SamplingParams
from real_megatron.rollout.remote.engine import drain
from real_megatron.rollout.remote.errors import RolloutError

T = TypeVar("T")


class FollowerEngine:
    """Stands on the ranks that do not own the servers: takes part in the weight export, leaves the rest to rank 0."""

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Iterate the stream: the export is collective, what it yields here is not needed."""
        drain(tensors)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def health(self) -> None: ...

    def close(self) -> None: ...


class DistributedRollout:
    """RolloutEngine over all ranks of a group. Every method is collective: all ranks call it, with equal arguments.

    With an engine on each rank (embedded), each serves a share of the prompts; with FollowerEngines on all ranks but
    the first (servers), the first serves all of them. Either way every rank returns the identical list, and an error on
    any rank is raised on all.

    group: carries pickled results: gloo serves best. A group of its own when generation overlaps training
        (`rollout.staleness`), since collectives of two threads must not mix.
    """

    def __init__(self, engine: RolloutEngine | FollowerEngine, group: dist.ProcessGroup | None = None) -> None:
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
        def serve(share: list[int]) -> list[list[Response]]:
            own_seeds = None if seeds is None else [seeds[i] for i in share]
            return self._engine.generate([prompts[i] for i in share], params, own_seeds)

        return self._shared([len(prompt) for prompt in prompts], serve)

    def next_token_logprobs(self, sequences: Sequence[list[int]], ids: Sequence[int]) -> Tensor:
        rows = self._shared(
            [len(sequence) for sequence in sequences],
            lambda share: list(self._engine.next_token_logprobs([sequences[i] for i in share], ids)),
        )
        return torch.stack(rows) if rows else torch.empty(0, len(ids))

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        stream = iter(tensors)

        def update() -> None:
            try:
                self._engine.update_weights(stream, version)
            finally:
                # The other ranks are still in the collective export.
                drain(stream)

        self._agreed(update)

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

    def _shared(self, lengths: list[int], serve: Callable[[list[int]], list[T]]) -> list[T]:
        """`serve` the indices of this rank's share, return the results of all in order."""
        if self._owned:
            share = list(range(len(lengths))) if self._rank == 0 else []
        else:
            # Dealt out by length: equal work, and batches of similar lengths.
            share = sorted(range(len(lengths)), key=lambda i: lengths[i])[self._rank :: self._size]
        parts = self._agreed(lambda: list(zip(share, serve(share), strict=True)) if share else [])
        results: list[Any] = [None] * len(lengths)
        for part in parts:
            for index, result in part:
                results[index] = result
        return results

    def _agreed(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result, or an error on all ranks when one had an error."""
        error: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as failure:
            error = failure
        outcomes = self._gather((None if error is None else f"{type(error).__name__}: {error}", result))
        if error is not None:
            raise error
        failures = [f"rank {rank}: {message}" for rank, (message, _) in enumerate(outcomes) if message]
        if failures:
            raise RolloutError("the rollout engine failed on another rank: " + "; ".join(failures))
        return [result for _, result in outcomes]

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values
