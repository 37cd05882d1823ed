"""The kernels that the tests of the head run: PyTorch, compiled, and the CUDA source on emulated CUDA threads."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from real_megatron.head import build, native
from real_megatron.head.shard import VocabularyShard

EMULATION = Path(__file__).parent / "cuda_on_cpu"


def needs_compiler() -> None:
    """Skip where no C++ compiler is found: such a machine has the PyTorch kernels alone."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    """head_cuda.cu compiled against tests/head/cuda_on_cpu, which runs each CUDA thread as a fiber."""
    needs_compiler()
    folder = tmp_path_factory.mktemp("emulated")
    source = (build.SOURCES / "head_cuda.cu").read_text()
    launch = re.compile(r"(\w+(?:<T>)?)<<<(.+?), kThreads, 0, s>>>\((.*?)\);", re.DOTALL)
    source, launches = launch.subn(r"cuda_on_cpu::launch(\2, kThreads, [&] { \1(\3); });", source)
    assert launches == 4
    (folder / "emulated.cpp").write_text(source)
    compiler = shutil.which("g++") or shutil.which("c++")
    includes = [f"-I{EMULATION}", f"-I{build.SOURCES}"]
    command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", *includes, str(folder / "emulated.cpp")]
    subprocess.run([*command, "-o", str(folder / "emulated.so")], check=True, capture_output=True)
    return native.Library("cuda", folder / "emulated.so")


@pytest.fixture(params=["torch", "fused", "emulated_cuda", *(["cuda"] if torch.cuda.is_available() else [])])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(kernels, device). `fused` on the CPU is the C++ library; `emulated_cuda` replaces it with the CUDA source."""
    if request.param == "torch":
        return "torch", "cpu"
    if request.param == "cuda":
        return "fused", "cuda"
    needs_compiler()
    if request.param == "emulated_cuda":
        emulate(monkeypatch, request.getfixturevalue("emulated_cuda"))
    return "fused", "cpu"


def emulate(monkeypatch: pytest.MonkeyPatch, emulated: native.Library) -> None:
    """Let CPU tensors go through the emulated CUDA library."""

    def call(name: str, logits: torch.Tensor, shard: VocabularyShard, arguments: tuple) -> None:
        floats = emulated.scratch(native._DTYPES[logits.dtype], logits.shape[0], shard.columns)
        scratch = torch.full((floats,), torch.nan)
        assert getattr(emulated, name)(*arguments, ctypes.c_void_p(scratch.data_ptr()), None) == 0

    monkeypatch.setattr(native, "_call", call)
