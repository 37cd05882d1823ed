"""The machine: GPUs and their driver, shared memory, limits, network."""

import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from real_megatron.doctor.environment import Environment, describe_end
from real_megatron.doctor.finding import Finding, guarded
from real_megatron.hardware import GPUS, peak_flops
from real_megatron.rollout.remote.process import tmpdir_too_long

TOPIC = "machine"
SHM = "/dev/shm"
SHM_ENOUGH = 2**30
"""NCCL within a node, the loaders of data and shared tensors lie there; Docker's default is 64 MiB."""
FILES_ENOUGH = 4096
"""gloo and NCCL hold a socket per pair of ranks and group: some hundred ranks need more than the usual 1024."""
_ASK_TIMEOUT_S = 30


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as the driver sees it."""

    index: int
    name: str
    memory_mib: int
    used_mib: int
    driver: str


def driver_gpus() -> list[DriverGpu]:
    """The GPUs of this machine, by nvidia-smi; none where that is not installed. RuntimeError where it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = "index,name,memory.total,memory.used,driver_version"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_ASK_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"nvidia-smi: {describe_end(done.returncode, done.stdout + done.stderr)}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    # A GPU divided into instances (MIG) does not tell its memory.
    return [DriverGpu(int(i), name, _number(total), _number(used), driver) for i, name, total, used, driver in rows]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def findings(environment: Environment) -> Iterator[Finding]:
    """Lines on this machine. environment: the trainer's, for what its torch makes of the GPUs"""
    yield from guarded(TOPIC, "GPUs", lambda: _gpus(environment))
    yield from _limits()
    yield from guarded(TOPIC, "network", _network)


def _gpus(environment: Environment) -> Iterator[Finding]:
    found, torch = driver_gpus(), environment.packages.get("torch")
    if not found:
        yield Finding(TOPIC, "GPUs", "note", "no NVIDIA driver (nvidia-smi): everything runs on the CPU, slowly")
        return
    yield Finding(TOPIC, "driver", "ok", found[0].driver)
    for gpu in found:
        text = f"{gpu.name}, {gpu.memory_mib / 1024:.1f} GiB, {gpu.used_mib / 1024:.1f} in use"
        if peak_flops(gpu.name) is None:
            fix = f"no MFU is reported; `plan` knows {', '.join(GPUS)}: add a row to real_megatron/hardware.py"
            yield Finding(TOPIC, f"GPU {gpu.index}", "note", f"{text}: not in the table of GPUs", fix)
        else:
            yield Finding(TOPIC, f"GPU {gpu.index}", "ok", text)
    if torch is None or torch.error or not torch.there:
        return
    if not torch.more.get("cuda"):
        fix = "install a CUDA build of torch: requirements/gpu.txt"
        yield Finding(
            TOPIC, "GPUs in torch", "broken", "this torch is built for the CPU: training would run there", fix
        )
    elif not torch.more.get("gpus"):
        text = (
            f"none: driver {found[0].driver} does not run CUDA {torch.more['cuda']}, or CUDA_VISIBLE_DEVICES is empty"
        )
        yield Finding(TOPIC, "GPUs in torch", "broken", text, "update the driver, or install a torch for its CUDA")
    else:
        yield Finding(TOPIC, "GPUs in torch", "ok", f"{torch.more['gpus']} of {len(found)}")


def _limits() -> Iterator[Finding]:
    try:
        size = shutil.disk_usage(SHM).total
    except OSError as error:
        yield Finding(TOPIC, SHM, "warning", error.strerror or str(error), f"mount a tmpfs at {SHM}")
    else:
        small = size < SHM_ENOUGH
        fix = "docker run --shm-size=16g, or --ipc=host" if small else ""
        yield Finding(TOPIC, SHM, "warning" if small else "ok", f"{size / 2**20:,.0f} MiB", fix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES_ENOUGH:
        yield Finding(TOPIC, "open files", "ok", f"{soft}")
    else:
        fix = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        yield Finding(TOPIC, "open files", "note", f"at most {soft}: few for hundreds of ranks", fix)
    too_long = tmpdir_too_long()
    yield Finding(TOPIC, "TMPDIR", "warning" if too_long else "ok", too_long or "short enough for servers' sockets")


def _network() -> Iterator[Finding]:
    listed = [f"{name} {', '.join(addresses)}" for name, addresses in interfaces().items()]
    yield Finding(TOPIC, "network", "ok", f"{platform.node()}: {'; '.join(listed) or 'no address but loopback'}")


def interfaces() -> dict[str, list[str]]:
    """Network interfaces that are up, without loopback: name → IPv4 and IPv6 addresses."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        name: [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and name != "lo"
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def interface_of(address: str, held: Mapping[str, Sequence[str]]) -> str:
    """The network interface that holds an address; empty without one. held: of a machine, as `interfaces` gives them"""
    return next((name for name, addresses in held.items() if address in addresses), "")
