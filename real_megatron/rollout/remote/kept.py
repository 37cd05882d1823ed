"""The current weights in host memory, for servers that come back between two syncs."""

import logging
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from real_megatron.rollout.remote.buckets import WeightBucket

logger = logging.getLogger(__name__)


class KeptWeights:
    """One set of weights, bucket by bucket, whose memory is used again by the next set.

    A bucket is copied by a thread, on a GPU in a stream of its own, while it is sent; `wait` before the next one is
    made. The memory is pinned: to pageable memory a GPU copies through a buffer of the driver, several times as slowly.

    `begin` is for when nobody reads the old set any more: from then on until `finish` there is no set.
    """

    def __init__(self, copies: bool) -> None:
        """copies: whether buckets are copied, since they are on a GPU; else they are kept as they are."""
        self._copies = copies
        self._held: list[WeightBucket] = []
        self._complete = False
        self._memory: list[Tensor] = []
        """What the copies of `_held` lie in, in their order."""
        self._free: list[Tensor] = []
        """That of the set before, from the place of the next bucket on."""
        self._pins = True
        self._copier = ThreadPoolExecutor(1, "kept-weights")
        self._copy: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def buckets(self) -> list[WeightBucket] | None:
        """The whole set; None before the first one, and while one is being replaced."""
        return self._held if self._complete else None

    def begin(self) -> None:
        """Give up the old set, or what there is of one that was not finished."""
        self._complete = False
        copy, self._copy = self._copy, None
        if copy is not None:
            wait([copy])  # an error was that sync's
        self._held = []
        self._memory, self._free = [], self._memory + self._free

    def add(self, bucket: WeightBucket) -> None:
        """Keep a bucket; with `copies` returns at once, and the bucket must not change before `wait`."""
        if self._copies:
            self._copy = self._copier.submit(self._keep, bucket)
        else:
            self._held.append(bucket)

    def wait(self) -> None:
        """Until the bucket that was added last is kept. Raises what its copy has raised."""
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.result()

    def finish(self) -> None:
        """The set is whole."""
        self._free = []
        self._complete = True

    def _keep(self, bucket: WeightBucket) -> None:
        target = self._next_memory(bucket.flat.numel())
        if bucket.flat.is_cuda:
            self._copy_in_stream(bucket.flat, target)
        else:
            target.copy_(bucket.flat)
        self._held.append(WeightBucket(bucket.names, bucket.dtypes, bucket.shapes, target))

    def _copy_in_stream(self, source: Tensor, target: Tensor) -> None:
        # The default stream, on which the bucket was made, has been waited for (buckets.py); it computes the next one.
        torch.cuda.set_device(source.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(source.device)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def _next_memory(self, size: int) -> Tensor:
        """That of the bucket which had this place in the set before, where it has the size; else new."""
        # What is not pinned any more has been moved to shared memory, for a server that was restored from it.
        if self._free and self._free[0].numel() == size and (self._free[0].is_pinned() or not self._pins):
            memory = self._free.pop(0)
        else:
            self._free = []  # sizes differ: old memory must not stay beside new
            memory = torch.empty(size, dtype=torch.uint8)
            if self._pins and not _pin(memory):
                self._pins = False
                logger.warning(
                    "host memory cannot be pinned: weights are kept for servers that come back (rollout.keep_weights) "
                    "in pageable memory, and syncs take longer; `ulimit -l` should be unlimited"
                )
        self._memory.append(memory)
        return memory


def _pin(memory: Tensor) -> bool:
    """Pin memory where it is: PyTorch's own allocator takes powers of two and gives nothing back. False where there is
    no GPU, or the driver refuses."""
    if not torch.cuda.is_available():
        return False
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        return False
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return True
