"""A stream of weights as flat buckets: bounded memory, few messages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class WeightBucket:
    """Whole tensors, laid end to end as bytes. Owns its storage: the source tensors may be reused."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[list[int]]
    flat: Tensor
    """uint8 `[bytes]`, on the source's device."""

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Views of `flat` by name."""
        views, start = [], 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            size = torch.Size(shape).numel() * dtype.itemsize
            views.append((name, self.flat[start : start + size].view(dtype).view(shape)))
            start += size
        return views

    def to_host(self) -> "WeightBucket":
        return WeightBucket(self.names, self.dtypes, self.shapes, self.flat.cpu())

    def to(self, device: torch.device) -> "WeightBucket":
        return WeightBucket(self.names, self.dtypes, self.shapes, self.flat.to(device))


def bucketed(
    stream: Iterable[tuple[str, Tensor]], limit: int, dtype: torch.dtype | None = None
) -> Iterator[WeightBucket]:
    """Buckets of at most `limit` bytes (one tensor may be larger); floating tensors are cast to `dtype` if given."""
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in stream:
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if held and size + tensor.numel() * target.itemsize > limit:
            yield _flatten(held)
            held, size = [], 0
        # The copy is needed: an exporter may reuse its buffers as soon as it is asked for the next tensor.
        held.append((name, tensor.detach().to(target, copy=True)))
        size += tensor.numel() * target.itemsize
    if held:
        yield _flatten(held)


def _flatten(tensors: list[tuple[str, Tensor]]) -> WeightBucket:
    # Widest first: every tensor then begins at a multiple of its own item size, as a typed view of bytes requires.
    tensors = sorted(tensors, key=lambda pair: -pair[1].element_size())
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])
    if flat.is_cuda:
        # The bucket is read from other threads and processes, which do not see this stream's order.
        torch.cuda.current_stream(flat.device).synchronize()
    names = [name for name, _ in tensors]
    return WeightBucket(names, [t.dtype for _, t in tensors], [list(t.shape) for _, t in tensors], flat)
