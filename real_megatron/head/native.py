"""ctypes binding of the compiled row kernels: CUDA for CUDA tensors, its C++ counterpart for CPU tensors."""

import ctypes
import logging
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from real_megatron.head.shard import VocabularyShard

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Library:
    """One compiled library. `error(code)` turns a launcher's non-zero result into text."""

    def __init__(self, kind: str, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.stats = getattr(self.library, f"head_{kind}_stats")
        self.dlogits = getattr(self.library, f"head_{kind}_dlogits")
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        # CPU: number of threads. CUDA: scratch memory, stream.
        tail = [integer] if kind == "cpu" else [pointer, pointer]
        self.stats.argtypes = [pointer, integer, *[size] * 4, *[pointer] * 3, integer, pointer, *tail]
        self.dlogits.argtypes = [pointer, pointer, integer, *[size] * 6, *[pointer] * 6, *tail]
        if kind == "cuda":
            self.scratch = self.library.head_cuda_scratch
            self.scratch.argtypes, self.scratch.restype = [integer, size, size], size
            self.check = self.library.head_cuda_check
            self.check.argtypes = []
            self.library.head_cuda_error.argtypes, self.library.head_cuda_error.restype = [integer], ctypes.c_char_p

    def error(self, code: int) -> str:
        return self.library.head_cuda_error(code).decode() if hasattr(self, "scratch") else f"error {code}"


@cache
def library(kind: str) -> Library | str:
    """The `cpu` or `cuda` library, compiled now if none is installed or cached; or why there is none, logged once."""
    try:
        return _load(kind)
    except (OSError, RuntimeError) as error:
        return _warn(kind, str(error))


def _warn(kind: str, reason: str) -> str:
    first_line = reason.partition("\n")[0]
    logger.warning("head: no compiled %s kernels (%s); the slower PyTorch kernels are used", kind, first_line)
    return reason


@cache
def _refused_by_gpu(index: int) -> str | None:
    """Why the CUDA library does not run on this GPU (a GPU or driver too old for its machine code), or None."""
    found = library("cuda")
    if isinstance(found, str):
        return found
    with torch.cuda.device(index):
        code = found.check()
    return _warn("cuda", f"GPU {index}: {found.error(code)}") if code else None


def built(kind: str) -> Path | None:
    """The file of the `cpu` or `cuda` library, or None if it is still to be compiled. BuildError where that cannot be
    done: no compiler."""
    # Imported late, so that `python -m real_megatron.head.build` finds its own module fresh.
    from real_megatron.head import build

    name = build.library_name(kind)
    if (build.INSTALLED / name).exists():
        return build.INSTALLED / name
    cached = build.cache_dir(kind) / name
    return cached if cached.exists() else None


def _load(kind: str) -> Library:
    from real_megatron.head import build

    if (there := built(kind)) is not None:
        return Library(kind, there)
    compile_into = build.build_cpu if kind == "cpu" else build.build_cuda
    cached = build.cache_dir(kind)
    logger.info("head: compiling the %s kernels into %s", kind, cached)
    try:
        return Library(kind, compile_into(cached))
    except build.BuildError as error:
        if not isinstance(error.__cause__, OSError):
            raise
    # The cache cannot be written to: compile for this process alone. Once loaded, a library does not need its file.
    with tempfile.TemporaryDirectory() as scratch:
        return Library(kind, compile_into(Path(scratch)))


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors like these have no compiled kernel, or None if they have one."""
    if device.type not in ("cpu", "cuda"):
        return f"compiled kernels run on cpu and cuda, not on {device.type}"
    if dtype not in _DTYPES:
        return f"compiled kernels take float32, bfloat16 and float16, not {dtype}; kernels='torch' does"
    found = library(device.type)
    if isinstance(found, str):
        return found
    return None if device.type == "cpu" else _refused_by_gpu(device.index)


def stats(
    logits: Tensor, ids: Tensor, offsets: Tensor, row_index: Tensor, values: Tensor | None, shard: VocabularyShard
) -> Tensor:
    """As `torch_kernels.stats`."""
    rows = logits.shape[0]
    logits = _dense_rows(logits)
    values = None if values is None else values.to(torch.float32).contiguous()
    ids, offsets = ids.contiguous(), offsets.contiguous()
    packed = logits.new_empty((2 if values is None else 3) * rows + ids.numel(), dtype=torch.float32)
    # Whether there are values is an argument of its own, because the address of an empty tensor is null.
    csr = (_pointer(ids), _pointer(offsets), _pointer(values), values is not None)
    sizes = (_DTYPES[logits.dtype], rows, logits.stride(0), *shard)
    _call("stats", logits, shard, (_pointer(logits), *sizes, *csr, _pointer(packed)))
    return packed


def dlogits(
    logits: Tensor,
    out: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row_index: Tensor,
    shard: VocabularyShard,
) -> None:
    """As `torch_kernels.dlogits`."""
    source = _dense_rows(logits)
    target = out if _rows_are_dense(out) else torch.empty_like(source, memory_format=torch.contiguous_format)
    kept = [t.to(torch.float32).contiguous() for t in (log_probs, maximum, total, grad)]
    kept += [ids.contiguous(), offsets.contiguous()]
    rows, width = logits.shape
    sizes = (_DTYPES[logits.dtype], rows, width, source.stride(0), target.stride(0), *shard)
    _call("dlogits", source, shard, (_pointer(source), _pointer(target), *sizes, *map(_pointer, kept)))
    if target is not out:
        out.copy_(target)


def _call(name: str, logits: Tensor, shard: VocabularyShard, arguments: tuple) -> None:
    found = library(logits.device.type)
    if isinstance(found, str):
        raise RuntimeError(found)
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            floats = found.scratch(_DTYPES[logits.dtype], logits.shape[0], shard.columns)
            scratch = logits.new_empty(floats, dtype=torch.float32)
            stream = torch.cuda.current_stream().cuda_stream
            code = getattr(found, name)(*arguments, _pointer(scratch), stream)
    else:
        code = getattr(found, name)(*arguments, torch.get_num_threads())
    if code:
        raise RuntimeError(f"head {name} kernel on {list(logits.shape)} {logits.dtype}: {found.error(code)}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows_are_dense(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] <= 1


def _dense_rows(x: Tensor) -> Tensor:
    return x if _rows_are_dense(x) else x.contiguous()
