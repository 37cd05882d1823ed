"""The table of GPUs."""

import pytest

from real_megatron.errors import ConfigError
from real_megatron.hardware import GPUS, find_gpu, peak_flops


def test_rates_are_dense_and_in_one_direction():
    """Data sheets give tensor-core rates with sparsity (twice as much), and NVLink's two directions together."""
    sheets = {
        # name: (TFLOP/s with sparsity, GB, TB/s, GB/s of NVLink, Gb/s of the adapter)
        "A100": (624, 80, 2.039, 600, 200),
        "H100": (1979, 80, 3.35, 900, 400),
        "H200": (1979, 141, 4.8, 900, 400),
        "B200": (4500, 180, 7.7, 1800, 400),
    }
    assert GPUS.keys() == sheets.keys()
    for name, (sparse, memory, bandwidth, nvlink, network) in sheets.items():
        gpu = find_gpu(name.lower())
        assert gpu.flops == pytest.approx(sparse / 2 * 1e12, rel=1e-3)
        assert gpu.bandwidth == pytest.approx(bandwidth * 1e12)
        assert (gpu.nvlink, gpu.network) == (nvlink / 2 * 1e9, network / 8 * 1e9)
        assert 0.95 * memory * 1e9 < gpu.memory < 1.08 * memory * 1e9
        assert peak_flops(f"NVIDIA {name}") == gpu.flops


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="'V100' is not in the table: choose one of A100, H100, H200, B200"):
        find_gpu("V100")
