"""What GPUs and the links between them can do: the small table behind MFU and behind estimates.

Sources, all NVIDIA's: "A100 Tensor Core GPU" (A100 80GB SXM), "H100 Tensor Core GPU" (SXM, PCIe and NVL), "H200 Tensor
Core GPU", "Blackwell Architecture" (HGX B200; GB200) data sheets, where tensor-core rates with sparsity are halved.
NVLink is given there for both directions: half is here. The network is that of the "DGX A100", "DGX H100", "DGX H200"
and "DGX B200" data sheets, one adapter a GPU: HDR InfiniBand (200 Gb/s) in the first, NDR (400 Gb/s) in the others.
Memory is what nvidia-smi reports less about half a GiB, which the CUDA context takes.
"""

from dataclasses import dataclass

from real_megatron.errors import ConfigError

# Dense bfloat16 tensor-core peak, in FLOP/s, by a part of the name that CUDA reports.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. Rates are peaks: what is reached of them, `planning` says."""

    name: str
    flops: float
    """Dense bfloat16 FLOP/s."""
    memory: float
    """Bytes that a process can allocate."""
    bandwidth: float
    """Bytes/s of the GPU's memory."""
    nvlink: float
    """Bytes/s to the other GPUs of its node, in one direction."""
    network: float
    """Bytes/s to other nodes, in one direction."""
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", _PEAKS["A100"], 79 * 2**30, 2.039e12, 300e9, 25e9),
        Gpu("H100", _PEAKS["H100"], 79 * 2**30, 3.35e12, 450e9, 50e9),
        Gpu("H200", _PEAKS["H200"], 139 * 2**30, 4.8e12, 450e9, 50e9),
        Gpu("B200", _PEAKS["B200"], 178 * 2**30, 7.7e12, 900e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in capitals or not. Raises ConfigError for one that the table does not have."""
    if name.upper() not in GPUS:
        raise ConfigError(f"GPU {name!r} is not in the table: choose one of {', '.join(GPUS)}")
    return GPUS[name.upper()]


def peak_flops(name: str) -> float | None:
    """Peak bfloat16 FLOP/s by the name that CUDA reports; None for GPUs that the table does not know."""
    return _PEAKS.get(_key(name))


def gpu_reported_as(name: str) -> Gpu | None:
    """The GPU by the name that CUDA reports; None where the links of that kind are not known."""
    return GPUS.get(_key(name))


def _key(name: str) -> str:
    return max((key for key in _PEAKS if key in name), key=len, default="")
