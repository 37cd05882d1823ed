"""`real-megatron doctor`: findings, on this machine and with packages that are broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from real_megatron.config import RunConfig
from real_megatron.doctor import fast_paths, machine, packages, requirements
from real_megatron.doctor.environment import Environment, Package, look
from real_megatron.doctor.examination import as_json, is_broken, table
from real_megatron.doctor.finding import Finding, guarded
from real_megatron.head import build, native
from real_megatron.rollout.remote.servers import weight_sync

ROOT = Path(__file__).parents[2]


def package(folder: Path, name: str, text: str, version: str = "") -> None:
    """A package of its own, with the metadata of a distribution if it has a version."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    if version:
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )


def run_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT)))), "COLUMNS": "200"}
    command = [sys.executable, "-m", "real_megatron", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_packages_that_raise_and_end_the_process_are_findings(tmp_path: Path) -> None:
    """The one run of the whole command: torch raises, pyarrow ends its process, and all else is still told."""
    package(tmp_path, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')", "2.13.0")
    package(tmp_path, "pyarrow", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "26.0.1")
    done = run_doctor("--json", path=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"] if one["topic"] == "packages"}
    assert (
        found["torch"]["state"] == "broken" and "not to be imported: OSError: libcudart.so.13" in found["torch"]["text"]
    )
    assert found["torch"]["fix"].startswith('pip install "torch')
    assert found["pyarrow"]["state"] == "broken" and "SIGSEGV" in found["pyarrow"]["text"]
    assert found["Python"]["state"] == "ok" and "PyYAML" not in found  # as it should be: one of the others
    paths = [one for one in json.loads(done.stdout)["findings"] if one["topic"] == "fast paths"]
    assert [one["name"] for one in paths] == list(fast_paths.LOOKS)
    assert all(one["state"] == "broken" and "libcudart.so.13" in one["text"] for one in paths)


def test_a_missing_server_environment_is_said(tmp_path: Path) -> None:
    found = list(packages.server_findings(str(tmp_path / "python"), "sglang"))
    assert [(one.topic, one.name, one.state) for one in found] == [("servers", "Python", "broken")]
    assert "No such file" in found[0].text and "rollout.python" in found[0].fix


def test_what_a_server_environment_lacks() -> None:
    found = {one.name: one for one in packages.server_findings(sys.executable, "sglang")}
    assert found["torch"].state == "ok" and found["transformers"].state == "ok" and "vllm" not in found
    assert found["sglang"] == Finding(
        "servers", "sglang", "broken", "not installed", f"{sys.executable} -m pip install sglang"
    )


def test_an_import_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "sleepy", "import time; time.sleep(60)")
    package(tmp_path, "loud", "print('{}'); __version__ = '7'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = look({"loud": "loud", "sleepy": "sleepy", "absent": "absent.inside"}, timeout_s=3)
    assert found.packages["loud"] == Package("loud", "7", True, "")
    assert "not done in 3 s" in found.packages["sleepy"].error
    assert not found.packages["absent"].there and not found.packages["absent"].error


@pytest.mark.parametrize(
    ("package", "state", "words"),
    [
        (Package("torch", "2.13.0", True, "", {"cuda": "13.0", "nccl": "2.28.9"}), "ok", "CUDA 13.0, NCCL 2.28.9"),
        (Package("torch", "2.9.1", True, "", {"cuda": ""}), "broken", "too old"),
        (Package("torch", "2.15.0", True, "", {"cuda": ""}), "broken", "too new"),
        (Package("torch", "", False, ""), "broken", "not installed"),
        (Package("megatron-core", "0.16.0", True, ""), "broken", "too old"),
        (Package("megatron-core", "0.19.2", True, ""), "ok", "0.19.2"),
        (Package("megatron-core", "0.20.0", True, ""), "warning", "newer than what has been tried"),
    ],
)
def test_versions_against_the_accepted_range(package: Package, state: str, words: str) -> None:
    found = packages.judged(package, requirements.required()[package.distribution])
    assert found.state == state and words in found.text
    assert bool(found.fix) == (state != "ok")


def test_the_accepted_range_of_megatron_is_that_of_the_code() -> None:
    from real_megatron.policy.megatron_versions import NEXT, OLDEST

    accepted = requirements.required()["megatron-core"]
    assert requirements.fits(OLDEST, accepted) == "yes" and requirements.fits(NEXT, accepted) == "new"


def test_optional_packages_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = packages.optional(Package("transformer-engine", "", False, ""), "fast")
    pinned = f"pip install --no-build-isolation -r {ROOT}/requirements/gpu.txt"
    assert missing.state == "note" and missing.fix == pinned
    damaged = packages.optional(Package("transformer-engine", "2.9", True, "OSError: libcublas"), "fast")
    assert damaged.state == "warning" and damaged.fix == f"pip uninstall transformer-engine, or {pinned}"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    monkeypatch.setattr(requirements, "ROOT", tmp_path)  # as installed: without requirements/
    assert requirements.install_transformer_engine().endswith('"transformer-engine[pytorch]>=2.0"')


def smi(folder: Path, lines: str, status: int = 0) -> None:
    """An nvidia-smi that prints this."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncat <<'E'\n{lines}\nE\nexit {status}\n")
    path.chmod(0o755)


def on_gpus(torch: dict[str, str | int]) -> dict[str, Finding]:
    environment = Environment("3.11", "python", {"torch": Package("torch", "2.13.0", True, "", torch)})
    return {one.name: one for one in machine.findings(environment)}


def test_gpus_the_driver_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    smi(tmp_path, "0, NVIDIA H100 80GB HBM3, 81559, 4, 580.65\n1, NVIDIA GeForce RTX 4090, 24564, [N/A], 580.65")
    found = on_gpus({"cuda": "13.0", "gpus": 2})
    assert found["driver"].text == "580.65"
    assert found["GPU 0"] == Finding("machine", "GPU 0", "ok", "NVIDIA H100 80GB HBM3, 79.6 GiB, 0.0 in use")
    assert found["GPU 1"].state == "note" and "real_megatron/hardware.py" in found["GPU 1"].fix
    assert found["GPUs in torch"] == Finding("machine", "GPUs in torch", "ok", "2 of 2")
    assert on_gpus({"cuda": ""})["GPUs in torch"].state == "broken"
    assert "driver 580.65 does not run CUDA 13.0" in on_gpus({"cuda": "13.0", "gpus": 0})["GPUs in torch"].text
    smi(tmp_path, "Failed to initialize NVML", 18)
    assert on_gpus({})["GPUs"].state == "broken" and "Failed to initialize NVML" in on_gpus({})["GPUs"].text


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(machine, "SHM", str(tmp_path / "absent"))
    found = on_gpus({})
    assert found["TMPDIR"].state == "warning" and "sockets" in found["TMPDIR"].text
    assert found["open files"].state == "note" and found["open files"].fix == "ulimit -n 4096"
    assert found[machine.SHM].state == "warning"
    monkeypatch.setattr(machine, "SHM", str(tmp_path))
    monkeypatch.setattr(machine, "SHM_ENOUGH", 2**60)
    assert "--shm-size" in on_gpus({})[machine.SHM].fix


def paths(*overrides: str) -> dict[str, Finding]:
    return {one.name: one for one in fast_paths.findings(RunConfig.from_yaml(None, overrides))}


def test_fast_paths_are_what_a_run_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = paths("rollout.engine=sglang", "model.spec=local")
    assert "dense masks" in found["attention"].text and "torch's" in found["Adam"].text
    assert found["layers"].text.endswith("no GPU") and found["experts"].state == "note"
    assert found["weight sync"].text == "gloo: no GPU"
    assert found["sglang"].state == "broken" and "sglang is not installed beside the trainer" in found["sglang"].text
    assert paths("model.spec=transformer_engine")["layers"].state == "broken"
    assert "in memory" in paths()["weight sync"].text
    assert "files" in paths("rollout.engine=vllm", "rollout.servers=[http://10.0.0.1:1]")["weight sync"].text
    # A library that is neither installed nor in the cache, with and without a compiler.
    monkeypatch.setattr(build, "INSTALLED", tmp_path)
    monkeypatch.setattr(build, "cache_dir", lambda kind: tmp_path)
    assert "compiled at first use" in paths()["head"].text and native.built("cpu") is None

    def no_compiler(kind: str) -> Path:
        raise build.BuildError("no C++ compiler on the PATH")

    monkeypatch.setattr(build, "cache_dir", no_compiler)
    assert paths()["head"].state == "note" and "plain torch: no C++ compiler" in paths()["head"].text


@pytest.mark.parametrize(
    ("overrides", "broadcasts", "way"),
    [
        ([], True, "distributed"),
        (["rollout.colocate=true"], True, "tensor"),
        ([], False, "disk"),
        (["rollout.weight_sync=disk"], True, "disk"),
    ],
)
def test_how_weights_reach_servers(overrides: list[str], broadcasts: bool, way: str) -> None:
    assert weight_sync(RunConfig.from_yaml(None, overrides).rollout, broadcasts) == way


def test_the_report() -> None:
    def fails() -> None:
        raise ImportError("[no] module")

    found = [Finding("machine", "nvcc", "note", "none", "get [it]"), *guarded("machine", "odd", fails)]  # type: ignore[arg-type]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(found, "title"))
    shown = capture.get()
    assert "→ get [it]" in shown and "ImportError: [no] module" in shown and shown.count("machine") == 1
    assert json.loads(as_json(found))["broken"] == 1
    assert is_broken(found) and not is_broken(found[:1])
