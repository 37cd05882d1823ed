"""What answers of hosts mean: made-up answers, of GPUs, networks and clocks that tests do not have."""

from typing import Any

import pytest

from real_megatron.cluster import checks
from real_megatron.cluster.checks import Offset
from real_megatron.cluster.hostfile import Host
from real_megatron.doctor.finding import Finding
from real_megatron.hardware import GPUS, gpu_reported_as
from real_megatron.planning.efficiency import DEFAULT

H100 = "NVIDIA H100 80GB HBM3"
HOSTS = [Host("a", 2), Host("b", 2)]


def gpu(index: int = 0, name: str = H100, used: int = 4) -> dict[str, Any]:
    return {"index": index, "name": name, "memory_mib": 81559, "used_mib": used, "driver": "580"}


def on(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {"a": {"gpus": a}, "b": {"gpus": b}}


def seen(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.name, one.state) for one in findings]


def test_gpus() -> None:
    two = [gpu(0), gpu(1)]
    good = list(checks.gpus(HOSTS, on(two, two)))
    assert seen(good) == [("a", "ok"), ("b", "ok")] and good[0].text == f"2 × {H100}, 80 GiB"
    few = list(checks.gpus(HOSTS, on(two, [gpu()])))
    assert seen(few) == [("a", "ok"), ("b", "broken")] and few[1].text == "1 GPUs, and 2 slots in the host file"
    assert seen(list(checks.gpus(HOSTS, on(two, [])))) == [("a", "ok"), ("b", "broken")]
    busy = list(checks.gpus(HOSTS, on([gpu(0), gpu(1, used=40_000)], two)))
    assert seen(busy) == [("a", "broken"), ("b", "ok")] and "memory in use on GPU 1 (40,000 MiB)" in busy[0].text
    mixed = list(checks.gpus(HOSTS, on(two, [gpu(0, "NVIDIA A100-SXM4-80GB")] * 2)))
    assert seen(mixed) == [("a", "warning"), ("b", "warning")]
    serving = [HOSTS[0], Host("b", 2, role="rollout")]
    assert seen(list(checks.gpus(serving, on(two, [gpu(0, "NVIDIA L40S")] * 2)))) == [("a", "ok"), ("b", "ok")]
    assert seen(list(checks.gpus(HOSTS, on([], [])))) == [("all", "note")]


def test_the_interface_of_the_address_and_infiniband() -> None:
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
    both = {"eno1": ["192.168.0.1"], "ib0": ["10.0.0.1"]}
    facts = {
        "a": {"interfaces": both, "infiniband": ["mlx5_0", "mlx5_1"]},
        "b": {"interfaces": {"ib0": ["10.0.0.2"]}, "infiniband": ["mlx5_0"]},
    }
    first, second = checks.network(addresses, facts)
    assert first.state == "ok" and first.text == "ib0 (10.0.0.1) for NCCL and gloo; InfiniBand: mlx5_0, mlx5_1"
    assert second.state == "warning" and "another host has 2 devices" in second.text
    facts["b"]["interfaces"] = {"eno1": ["192.168.0.2"]}
    assert list(checks.network(addresses, facts))[1].text == "no interface holds 10.0.0.2: eno1 192.168.0.2"


@pytest.mark.parametrize(
    ("seconds", "bound", "state"),
    [(0.9, 0.01, "ok"), (-1.2, 0.1, "warning"), (1.2, 0.3, "ok"), (61, 0.5, "broken"), (-61, 2.0, "warning")],
)
def test_clocks_are_judged_by_what_is_sure(seconds: float, bound: float, state: str) -> None:
    assert checks.clock("a", Offset(seconds, bound)).state == state


@pytest.mark.parametrize(("free", "state"), [(10**8, "broken"), (10**10, "warning"), (10**12, "ok")])
def test_free_disk(free: int, state: str) -> None:
    assert checks.disk("a", "/data", free).state == state


def test_a_directory_that_one_host_cannot_write_or_does_not_share() -> None:
    found = list(checks.shared_files("/data", {"a": [], "b": ["a"], "c": []}, {}))
    assert seen(found) == [("a", "ok"), ("b", "broken"), ("c", "ok")]
    found = list(checks.shared_files("/data", {"a": ["b"], "b": [], "c": ["b"]}, {}))
    assert seen(found) == [("a", "ok"), ("b", "broken"), ("c", "ok")], "the first host's view decides"
    found = list(checks.shared_files("/data", {"b": [], "c": []}, {"a": "Permission denied"}))
    assert seen(found) == [("a", "broken"), ("b", "ok"), ("c", "ok")] and "Permission denied" in found[0].text


def test_measured_rates_beside_planned_ones() -> None:
    size, ranks = 2**28, 16
    planned = 8 * GPUS["H100"].network * DEFAULT.network  # a ring between nodes uses all adapters
    ideal = 2 * (ranks - 1) / ranks * size / planned
    measured = {"ranks": ranks, "bytes": size, "backend": "nccl", "gpu": H100, "all_reduce": ideal, "broadcast": 1.0}
    reduced, cast = checks.collectives(measured, 8)
    # Planning counts the latency of two calls, the ideal none.
    assert reduced.state == "ok" and f"{planned / 1e9:.1f} GB/s; planned" in reduced.text
    assert cast.state == "warning" and "0.3 GB/s; planned 34." in cast.text and "NCCL_DEBUG" in cast.fix
    unknown = list(checks.collectives({**measured, "gpu": "NVIDIA L40S"}, 8))
    assert unknown[0].state == "note" and "no figure for NVIDIA L40S" in unknown[0].text
    alone = list(checks.collectives({**measured, "ranks": 1, "gpu": ""}, 1))
    assert [one.state for one in alone] == ["note", "note"] and "nobody to send to" in alone[0].text


def test_gpus_by_the_name_that_cuda_reports() -> None:
    assert gpu_reported_as(H100) is GPUS["H100"] and gpu_reported_as("NVIDIA H200") is GPUS["H200"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40S", ""):
        assert gpu_reported_as(other) is None, "its links are others"
