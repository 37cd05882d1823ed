"""A rank's own part of the distributed optimizer's state, as pieces of whole tensors that any layout can read.

Megatron's distributed optimizer gives a rank a range of a flat buffer, which begins and ends anywhere in parameters. Of
the sharding types of its own checkpoints, `dp_reshardable` writes that buffer, for one model-parallel layout alone;
`fully_reshardable` gathers the state of a model shard in one rank and has each rank read all of it. Here each rank
writes and reads its part, under the names and shapes of `fully_reshardable`: what one type has written the other reads.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

TENSORS = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter, in float32, by Megatron's names."""
_PREFIX = ("optimizer", "state")


def optimizer_shards(optimizers: Iterable[DistributedOptimizer], models: Any) -> dict[str, ShardedTensor]:
    """This rank's part of the optimizers' state, in place: what is read into it is read into the optimizers.

    Their moments must have been allocated. models: the sharded state of the model chunks, whose tensors are the
    parameters themselves; it gives each its name and its place in the whole tensor
    """
    values = [value for value in nested_values(models) if isinstance(value, ShardedTensor | ShardedTensorFactory)]
    places = {id(value.data): value for value in values}
    found: dict[str, ShardedTensor] = {}
    for one in optimizers:
        for parameter, start, end in _ranges(one):
            state = one._get_main_param_and_optimizer_states(parameter)
            for name in TENSORS:
                for piece in _pieces(places[id(parameter)], parameter, state[name].detach(), start, end):
                    piece.key = ".".join((*_PREFIX, name, piece.key))
                    found[str(len(found))] = piece
    return found


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the fewest boxes that make up elements `start` to `end` of a row-major tensor, in order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # all within one row
        for offset, size in boxes(shape[1:], start - last * row, end - last * row):
            yield (last, *offset), (1, *size)
        return
    for offset, size in boxes(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield (first - 1, *offset), (1, *size)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offset, size in boxes(shape[1:], 0, end - last * row):
        yield (last, *offset), (1, *size)


def _ranges(one: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """Each parameter of which this rank has a part, and that part: from which element of it to which."""
    for buffer in one.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(
    place: ShardedTensor | ShardedTensorFactory, parameter: Tensor, values: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """`values`, which belong to elements `start` to `end` of a parameter, as boxes of the whole tensor."""
    # Of a layer with gates, a factory makes two tensors of one parameter.
    parts = [place] if isinstance(place, ShardedTensor) else list(nested_values([place.build()]))
    for part in parts:
        assert part.data.is_contiguous(), f"{part.key}: its parts do not follow one another in memory"
        before = part.data.storage_offset() - parameter.storage_offset()
        low, high = max(start - before, 0), min(end - before, part.data.numel())
        stacked = part.prepend_axis_num  # layers or experts of one name
        position = before + low - start
        for offset, size in boxes(tuple(part.local_shape), low, high):
            numel = math.prod(size)
            box = (1,) * stacked + size
            corner = (*(0 for _ in range(stacked)), *offset)
            yield ShardedTensor(
                part.key,
                values[position : position + numel].view(box),
                values.dtype,
                box,
                part.global_shape,
                tuple(a + b for a, b in zip(part.global_offset, corner, strict=True)),
                axis_fragmentations=None,
                # The last number counts data-parallel ranks, each of which has another part.
                replica_id=(*part.replica_id[:2], 0),
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
            position += numel
