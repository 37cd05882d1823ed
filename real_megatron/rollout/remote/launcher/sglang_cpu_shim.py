"""Lets SGLang 0.5.21 import on a machine without a GPU. Imported by launch.py only there, before sglang.

Runs in SGLang's own environment, in the parent and in every process that it spawns; needs nothing of real_megatron.
"""

import importlib.machinery
import os
import sys
import types

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# torchvision's binary may be a CUDA build, which does not load here; its Python part insists on two of its operators.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _Absent(types.ModuleType):
    """A kernel package whose functions are imported by name and never called on the torch-native path."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise NotImplementedError(f"{self.__name__}.{name} needs a GPU build of SGLang's kernels")

        return absent


_kernels = _Absent("sgl_kernel")
_kernels.__path__ = []
_kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
sys.modules["sgl_kernel"] = _kernels
