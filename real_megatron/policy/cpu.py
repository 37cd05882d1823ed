"""Lets Megatron-Core run on CPU with gloo. Active only where no CUDA device exists.

Megatron-Core names CUDA in a few places even when every tensor is on the CPU: the current device, allocation with
`device="cuda"`, CUDA random states, streams, and the tensor types that gradient clipping asserts. Each is mapped to its
CPU counterpart here, in the running process; nothing on disk is touched.
"""

import contextlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from real_megatron.policy import gloo


class CpuDeviceMode(TorchFunctionMode):
    """Sends `device="cuda"` arguments and `.cuda()` calls to the CPU, and reports CPU tensor types as CUDA ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping asserts `grad.type() == "torch.cuda.FloatTensor"`.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _NoStream:
    """Stands for a CUDA stream or event: everything on CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def synchronize(self) -> None: ...


_installed = False


def install() -> None:
    """Map the CUDA functions that Megatron-Core calls to CPU ones, once per process."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True

    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    _replace(torch.cuda, _CUDA)
    _replace(torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing})
    _replace(
        megatron_random,
        {
            "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
            "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        },
    )
    _replace(token_dispatcher, {"maybe_move_tensor_to_cpu": _split_sizes_to_numpy})
    gloo.install()


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _no_stream(*args: Any, **kwargs: Any) -> _NoStream:
    return _NoStream()


def _seed(seed: int) -> torch.Generator:
    return torch.default_generator.manual_seed(seed)


_CUDA: dict[str, Any] = {
    "current_device": lambda: "cpu",
    "device_count": lambda: 0,
    "synchronize": _nothing,
    "Stream": _NoStream,
    "Event": _NoStream,
    "current_stream": _no_stream,
    "default_stream": _no_stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "manual_seed": _seed,
    "manual_seed_all": _seed,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
}
"""Replacements in `torch.cuda`."""


def _replace(module: ModuleType, replacements: dict[str, Any]) -> None:
    for name, replacement in replacements.items():
        setattr(module, name, replacement)


def _split_sizes_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Replaces Megatron-Core's function, which returns CPU tensors unchanged even where numpy is asked for."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def device_mode() -> contextlib.AbstractContextManager[Any]:
    """Context in which Megatron-Core code runs: `CpuDeviceMode` without a CUDA device, nothing with one.

    Scoped rather than global, because the mode costs some Python time on every torch call.
    """
    return contextlib.nullcontext() if torch.cuda.is_available() else CpuDeviceMode()
