"""The export at layouts with replicas: bit-identical to the files, owner by owner, by no more ranks than needed."""

import os
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch

from real_megatron.bridge import describe, parameters
from real_megatron.bridge.owners import Owner, owner_buckets
from tests.support.bridge_ranks import check_exports, tiny_config, tiny_model
from tests.support.ranks import run_ranks

# Name: ranks, parallel sizes, expert-tensor-parallel size, and the ranks that an export to rank 0 leaves alone. Ranks
# count tensor, context, data and pipeline; for experts tensor, expert, data and pipeline.
LAYOUTS = {
    "dp4": (4, {}, None, {1, 2, 3}),
    "tp2 dp2": (4, {"tensor": 2}, None, {2, 3}),
    "pp2 dp2": (4, {"pipeline": 2}, None, {1, 3}),
    "cp2 dp2 ep2": (4, {"context": 2, "expert": 2}, None, {2, 3}),
    "tp2 dp2 ep4 etp1": (4, {"tensor": 2, "expert": 4}, 1, set()),
    "tp2 pp2 ep2 etp1": (4, {"tensor": 2, "pipeline": 2, "expert": 2}, 1, set()),
    "tp2 cp2 pp2": (8, {"tensor": 2, "context": 2, "pipeline": 2}, None, {2, 3, 6, 7}),
    "tp2 pp2 ep2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}, None, set()),
    "tp2 cp2 ep2 etp1": (8, {"tensor": 2, "context": 2, "expert": 2}, 1, {2, 3, 4, 5, 6, 7}),
    "pp4 ep2": (8, {"pipeline": 4, "expert": 2}, None, set()),
}
eight = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="eight ranks: with LONG_TESTS=1")


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=eight)])
def test_exports_with_replicas(tmp_path: Path, ranks: int) -> None:
    """To every rank, and to rank 0 alone, in which of each replica's copies one is sent."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    layouts = {name: rest for name, (world, *rest) in LAYOUTS.items() if world == ranks}
    found = run_ranks(ranks, check_exports, str(tmp_path), [tuple(rest[:2]) for rest in layouts.values()])
    for i, (name, (_, _, idle)) in enumerate(layouts.items()):
        assert [rank[i][0] for rank in found] == [[]] * ranks, name
        assert {rank for rank in range(ranks) if found[rank][i][1] == 0} == idle, name


def test_a_bucket_has_one_owner_and_its_limit() -> None:
    """Two stages, four expert-parallel ranks, and routers in another dtype: whatever the limit, every parameter once,
    and no more buckets than owners and bytes ask for."""
    everything = parameters(describe(tiny_config("qwen3_moe")))
    owners = {
        p.name: Owner(
            stage=0 if p.layer in (None, 0, 1) else 1,
            expert_rank=None if p.expert is None else p.expert // 2,
            dtype=torch.float32 if "router" in p.name else torch.bfloat16,
        )
        for p in everything
    }
    sizes = {p.name: prod(p.transform.shape) * owners[p.name].dtype.itemsize for p in everything}
    largest = max(sizes.values())
    for limit in (1, 3 * largest, 10**9):
        buckets = list(owner_buckets(everything, owners, limit))
        assert sorted(p.name for b in buckets for p in b.parameters) == sorted(sizes)
        assert all({owners[p.name] for p in b.parameters} == {b.owner} for b in buckets)
        filled = [sum(sizes[p.name] for p in b.parameters) for b in buckets]
        assert all(size <= limit or len(b.parameters) == 1 for size, b in zip(filled, buckets, strict=True))
        changes = sum(one.owner != other.owner for one, other in pairwise(buckets))
        assert changes == len(set(owners.values())) - 1 == 11
        if limit > largest:
            assert len(buckets) <= sum(filled) / (limit - largest) + 12
    order = {p.name: i for i, p in enumerate(everything)}
    assert all(order[a.name] < order[b.name] for bucket in buckets for a, b in pairwise(bucket.parameters))
