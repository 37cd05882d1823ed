"""Building the kernels: no spills on any GPU generation, one library for many processes, failures that say why."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from real_megatron.head import build, native


def nvcc_missing() -> bool:
    try:
        build.nvcc()
    except build.BuildError:
        return True
    return False


# A machine without nvcc shows these as skipped (-ra prints why): there the kernels are compiled for a CPU alone, by the
# emulation in conftest.py.
needs_nvcc = pytest.mark.skipif(nvcc_missing(), reason="no nvcc: the CUDA kernels were NOT compiled for sm_80/90/100")


def ptxas_report(architecture: int, output: Path, source: Path) -> str:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [build.nvcc(), *build.CUDA_FLAGS, "-gencode", target, "-cubin", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def spilled_bytes(report: str) -> list[int]:
    return [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]


@needs_nvcc
@pytest.mark.parametrize("architecture", build.CUDA_ARCHITECTURES)
def test_kernels_compile_without_spills_and_run_four_blocks_an_sm(architecture: int, tmp_path: Path) -> None:
    report = ptxas_report(architecture, tmp_path / "out.cubin", build.SOURCES / "head_cuda.cu")
    kernels = report.count("Compiling entry function")
    assert kernels == 10  # stats_tiles, stats_rows and dlogits_tiles for three dtypes, dlogits_rows
    spills = spilled_bytes(report)
    assert len(spills) == 2 * kernels and not any(spills), report
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == kernels and max(registers) <= 64
    assert "warning" not in report


@needs_nvcc
def test_spills_would_be_seen(tmp_path: Path) -> None:
    # Eight blocks an SM leave 32 registers a thread, too few for what is in flight.
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    source = tmp_path / "csrc" / "head_cuda.cu"
    source.write_text(source.read_text().replace("__launch_bounds__(kThreads, 4)", "__launch_bounds__(kThreads, 8)"))
    assert any(spilled_bytes(ptxas_report(90, tmp_path / "out.cubin", source)))


@needs_nvcc
def test_cuda_library_builds_and_loads_without_a_gpu(tmp_path: Path) -> None:
    library = native.Library("cuda", build.build_cuda(tmp_path))
    if not torch.cuda.is_available():  # what a machine without a driver, or with an old one, is told
        assert library.check() != 0 and "driver" in library.error(library.check())
    # Two floats per row and tile of 16,384 half-precision columns.
    assert library.scratch(1, 100, 151_936) == 2 * 100 * 10
    assert library.scratch(0, 100, 0) == 2 * 100


def test_the_cpu_library_is_vectorised(tmp_path: Path) -> None:
    # GCC's own account of the two loops that hold an exponential; scalar, they are slower than PyTorch.
    compiler = build.cxx()
    if "Free Software Foundation" not in build._run([compiler, "--version"]):
        pytest.skip("the report of vectorised loops is GCC's")
    report = build._run(
        [compiler, *build.CPU_FLAGS, "-fopt-info-vec-optimized", str(build.SOURCES / "head_cpu.cpp")]
        + ["-o", str(tmp_path / "library.so")]
    )
    for name, loop in {
        "row_math.h": "+= exp_below(get(i + l)",
        "head_cpu.cpp": "store(out + i, dense_gradient(",
    }.items():
        lines = (build.SOURCES / name).read_text().splitlines()
        number = next(i for i, line in enumerate(lines, 1) if loop in line)
        assert re.search(rf"{name}:{number}:\d+: optimized: loop vectorized", report), report


@pytest.mark.parametrize("nvcc", ["absent", "broken", "working"])
def test_installing_never_fails_for_lack_of_a_compiler(nvcc: str, tmp_path: Path) -> None:
    root, tools = tmp_path / "root", tmp_path / "bin"
    package = Path(build.__file__).parents[1]
    head = root / "real_megatron" / "head"
    shutil.copytree(package / "head" / "csrc", head / "csrc")
    for name in ("__init__.py", "version.py", "head/__init__.py", "head/build.py"):
        shutil.copy(package / name, root / "real_megatron" / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(package.parent / name, root)
    tools.mkdir()
    if nvcc != "absent":
        # Stands for nvcc: names its targets, then fails or writes the file after -o.
        last = 'while [ "$1" != -o ]; do shift; done; : > "$2"' if nvcc == "working" else "echo no luck; exit 1"
        script = f'#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then echo sm_80 sm_90; else {last}; fi\n'
        (tools / "nvcc").write_text(script)
        (tools / "nvcc").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "built")],
        cwd=root,
        env={"PATH": f"{tools}:/bin"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    library = tmp_path / "built/real_megatron/head/lib"
    wanted = [build.library_name("cuda")] if nvcc == "working" else []
    assert [path.name for path in library.glob("*")] == wanted
    assert ("cuda: not built: " in done.stderr and "no luck" in done.stderr) == (nvcc == "broken")
    assert (tmp_path / "built/real_megatron/head/csrc/head_cuda.cu").exists()  # for the build at first use


def test_processes_that_build_at_once_share_one_library(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(build.__file__)), "cpu", "--output", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=300)[0] for process in processes}
    library = tmp_path / build.library_name("cpu")
    assert said == {f"cpu: {library}\n"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]
    native.Library("cpu", library)
    # A second build finds it.
    before = library.stat().st_mtime_ns
    assert build.build_cpu(tmp_path) == library and library.stat().st_mtime_ns == before


def test_the_name_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    names = [build.library_name("cpu"), build.library_name("cuda")]
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert [build.library_name("cpu"), build.library_name("cuda")] == names
    with (tmp_path / "csrc" / "row_math.h").open("a") as file:
        file.write("// changed\n")
    assert build.library_name("cpu") != names[0] and build.library_name("cuda") != names[1]


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    (tmp_path / "csrc" / "head_cpu.cpp").write_text("int broken(")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    with pytest.raises(build.BuildError, match=r"failed with exit status 1:\n(.|\n)*error"):
        build.build_cpu(tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_an_optional_build_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = ["cpu", "--output", str(tmp_path / "file" / "lib")]
    assert build.main(arguments) == 1
    assert build.main([*arguments, "--optional"]) == 0
    assert "cpu: not built: cannot write" in capsys.readouterr().err


def test_set_up_can_run_the_file_before_anything_is_installed(tmp_path: Path) -> None:
    # -S -I: no site-packages, no torch.
    command = [sys.executable, "-S", "-I", build.__file__, "cpu", "--optional", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"cpu: {tmp_path / build.library_name('cpu')}\n"
