"""Compiles the row kernels: the CUDA library with nvcc, its CPU counterpart with the C++ compiler.

Standard library only, so that set-up can run this file before anything is installed:

    python real_megatron/head/build.py --optional --output real_megatron/head/lib cuda
    python -m real_megatron.head.build cpu cuda            # into the user's cache, where first use looks

A library's file name contains a hash of its sources, so one from older sources is never loaded.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
INSTALLED = Path(__file__).resolve().parent / "lib"

# Without -fno-trapping-math GCC does not vectorise the branch-free exponential, which is six times slower.
CPU_FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-fno-trapping-math",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
)
CPU_FLAGS += ("-Wall", "-Wextra")
# No -use_fast_math: only subnormals are flushed, which lets exp2f be one instruction.
CUDA_FLAGS = ("-O3", "-std=c++17", "-ftz=true", "-Xptxas", "-v")
CUDA_ARCHITECTURES = (80, 90, 100)
COMPILE_TIMEOUT_S = 600


class BuildError(RuntimeError):
    """No compiler, or it failed; the message has its output."""


def library_name(kind: str) -> str:
    """File name of the `cpu` or `cuda` library of the present sources."""
    digest = hashlib.sha256()
    for name in ("row_math.h", {"cpu": "head_cpu.cpp", "cuda": "head_cuda.cu"}[kind]):
        digest.update((SOURCES / name).read_bytes())
    return f"libreal_megatron_head_{kind}-{digest.hexdigest()[:16]}.so"


def build_cpu(output_dir: Path) -> Path:
    """Compile the C++ library for this machine, unless it is there already; returns its path.
    BuildError if that fails."""
    command = [cxx(), *CPU_FLAGS, str(SOURCES / "head_cpu.cpp")]
    return _compile(command, output_dir / library_name("cpu"))


def build_cuda(output_dir: Path) -> Path:
    """Compile the CUDA library for the architectures that nvcc knows, unless it is there already; returns its path.
    BuildError if that fails."""
    command = [nvcc(), *CUDA_FLAGS, *cuda_targets(), "-shared", "-Xcompiler", "-fPIC", str(SOURCES / "head_cuda.cu")]
    return _compile(command, output_dir / library_name("cuda"))


def cuda_targets() -> list[str]:
    """nvcc's -gencode options: machine code for CUDA_ARCHITECTURES, PTX of the newest for later GPUs."""
    listed = _run([nvcc(), "--list-gpu-code"])
    known = [arch for arch in CUDA_ARCHITECTURES if re.search(rf"\bsm_{arch}\b", listed)]
    if not known:
        raise BuildError(f"{nvcc()} knows none of the GPU architectures {CUDA_ARCHITECTURES}")
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in known]
    codes.append(f"arch=compute_{known[-1]},code=compute_{known[-1]}")
    return [option for code in codes for option in ("-gencode", code)]


def cache_dir(kind: str) -> Path:
    """The user's folder for libraries of this compiler and, for the C++ library, this kind of processor."""
    compiler = cxx() if kind == "cpu" else nvcc()
    flags = CPU_FLAGS if kind == "cpu" else (*CUDA_FLAGS, *cuda_targets())
    machine = _processor() if kind == "cpu" else platform.machine()
    key = "\n".join([compiler, _run([compiler, "--version"]), *flags, machine])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "real_megatron" / "head" / hashlib.sha256(key.encode()).hexdigest()[:16]


@cache
def cxx() -> str:
    """Path of the C++ compiler. BuildError without one."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++) on the PATH")
    return found


@cache
def nvcc() -> str:
    """Path of the CUDA compiler. BuildError without one."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        raise BuildError("no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda")
    return found


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted}))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} could not run: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with exit status {done.returncode}:\n{output}")
    return output


def _compile(command: list[str], library: Path) -> Path:
    """Run `command` unless `library` exists; one process compiles, the others wait, and none sees a partial file."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                    fresh = Path(scratch) / library.name
                    _run([*command, "-o", str(fresh)])
                    os.replace(fresh, library)
    except OSError as error:
        raise BuildError(f"cannot write {library}: {error}") from error
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=("cpu", "cuda"), metavar="{cpu,cuda}", help="what to build")
    parser.add_argument("--output", type=Path, help="folder of the libraries (default: the user's cache)")
    parser.add_argument("--optional", action="store_true", help="a failure is reported, but the exit status stays 0")
    options = parser.parse_args(arguments)
    status = 0
    for kind in options.kinds:
        try:
            build = build_cpu if kind == "cpu" else build_cuda
            print(f"{kind}: {build(options.output or cache_dir(kind))}")
        except BuildError as error:
            print(f"{kind}: not built: {error}", file=sys.stderr)
            status = 0 if options.optional else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
