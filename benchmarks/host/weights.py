"""An export of weights for servers, to which rank 0 sends: in the table's order to every rank, by owner to rank 0.

    python -m benchmarks.host.weights --ranks 2 8 32

Measured with a small mixture of experts, TP 2 and a quarter of the ranks as EP, in buckets of 64 MiB; beyond 8 ranks
counted. Qwen3-235B-A22B is counted from its configuration, TP 2 and as many ranks as EP as there are, at most 32, in
buckets of 512 MiB: on rank 0, and on the last rank, whom nobody asks for anything as soon as there is a second replica.
Bytes are those that a rank receives.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig, Qwen3MoeConfig

from benchmarks.host.ranks import run
from benchmarks.host.row import Row
from real_megatron.bridge import ModelDescription, Parameter, describe, export_hf, parameters
from real_megatron.bridge.export import find_owners
from real_megatron.bridge.gathering import Groups, OnEveryRank
from real_megatron.bridge.live import local_parameters
from real_megatron.bridge.owners import Owner, OwnerBucket, owner_buckets
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.policy.model import build_model
from real_megatron.policy.parallel_groups import initialize

LARGE = Path(__file__).parents[2] / "tests/fixtures/configs/Qwen3-235B-A22B.json"
LARGE_BUCKET, SMALL_BUCKET = 512 * 2**20, 64 * 2**20
MEASURED = 8
"""Most ranks that run here."""
REPEATS = 2
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Layout:
    """Ranks count tensor, then data; of experts tensor, expert, data."""

    ranks: int
    tensor: int
    expert: int

    def received(self, buckets: Sequence[OwnerBucket], rank: int, everywhere: bool) -> list[float]:
        """Bytes that come to a rank of each bucket."""
        mine = rank // self.tensor % self.expert
        found = []
        for bucket in buckets:
            size, owner = bucket_bytes(bucket), bucket.owner.expert_rank
            shards = size * (self.tensor - 1) / self.tensor
            if everywhere or rank == 0:
                found.append(shards if owner in (None, mine) else size)
            else:  # the first tensor-parallel rank of an owner gathers for rank 0
                gathers = owner == mine and rank < self.tensor * self.expert and rank % self.tensor == 0
                found.append(shards if gathers else 0)
        return found


def small_layout(ranks: int) -> Layout:
    return Layout(ranks, 2, max(1, ranks // 4))


def large_layout(ranks: int) -> Layout:
    return Layout(ranks, 2, min(32, ranks // 2))


def rows(ranks: int) -> list[Row]:
    """The small model's export, and the large one's on rank 0 and on the last rank; both ways."""
    found = []
    layout, description = small_layout(ranks), describe(small_config())
    seconds: dict[str, float | None] = {"before": None, "after": None}
    if ranks <= MEASURED:
        results = run(ranks, seconds_of_exports, layout)
        seconds = {variant: max(one[variant] for one in results) for variant in seconds}
    for variant, buckets in both(description, layout, SMALL_BUCKET).items():
        moved, held = costs(layout, buckets, 0, variant == "before")
        how: Literal["measured", "counted"] = "measured" if ranks <= MEASURED else "counted"
        found.append(Row("export of a small MoE to rank 0", variant, ranks, seconds[variant], moved, held, how))
    layout, description = large_layout(ranks), describe(AutoConfig.from_pretrained(LARGE))
    for name, rank in (("rank 0", 0), ("the last rank", ranks - 1)):
        for variant, buckets in both(description, layout, LARGE_BUCKET).items():
            moved, held = costs(layout, buckets, rank, variant == "before")
            part = f"export of Qwen3-235B-A22B to rank 0, on {name}"
            found.append(Row(part, variant, ranks, None, moved, held, "counted"))
    return found


def large_buckets(ranks: int) -> dict[str, tuple[int, int]]:
    """Buckets of an export of the large model, and how often their owner changes, each way."""
    buckets = both(describe(AutoConfig.from_pretrained(LARGE)), large_layout(ranks), LARGE_BUCKET)
    return {variant: (len(some), changes(some)) for variant, some in buckets.items()}


def costs(layout: Layout, buckets: Sequence[OwnerBucket], rank: int, everywhere: bool) -> tuple[float, float]:
    """Bytes that a rank receives, and those of the largest bucket that it has to hold for it."""
    received = layout.received(buckets, rank, everywhere)
    held = [bucket_bytes(bucket) for bucket, size in zip(buckets, received, strict=True) if size]
    return float(sum(received)), float(max(held, default=0))


def both(description: ModelDescription, layout: Layout, limit: int) -> dict[str, list[OwnerBucket]]:
    """The buckets of both ways, worked out from the description."""
    everything = parameters(description)
    per_rank = description.num_experts // layout.expert
    owners = {p.name: Owner(0, None if p.expert is None else p.expert // per_rank, DTYPE) for p in everything}
    return {
        "before": list(table_buckets(everything, owners, limit)),
        "after": list(owner_buckets(everything, owners, limit)),
    }


def changes(buckets: Sequence[OwnerBucket]) -> int:
    return sum(one.owner != other.owner for one, other in zip(buckets[:-1], buckets[1:], strict=True))


def bucket_bytes(bucket: OwnerBucket) -> int:
    return sum(bucket.sizes) * bucket.owner.dtype.itemsize


def table_buckets(everything: list[Parameter], owners: Mapping[str, Owner], limit: int) -> Iterator[OwnerBucket]:
    """As they were: in the table's order, a new one wherever the owner changes."""
    bucket, size = OwnerBucket(owners[everything[0].name]), 0
    for parameter in everything:
        owner = owners[parameter.name]
        more = prod(parameter.transform.shape) * owner.dtype.itemsize
        if bucket.parameters and (owner != bucket.owner or size + more > limit):
            yield bucket
            bucket, size = OwnerBucket(owner), 0
        bucket.parameters.append(parameter)
        size += more
    yield bucket


# --- on a rank --------------------------------------------------------------------------------------------------------


def small_config() -> Qwen3MoeConfig:
    """0.4 GB in bfloat16: 8 layers of 64 experts."""
    return Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_experts=64,
        num_experts_per_tok=4,
        max_position_embeddings=64,
    )


def seconds_of_exports(layout: Layout) -> dict[str, float]:
    """This rank's seconds of an export each way, the fastest of some, which all ranks begin together."""
    parallel = ParallelConfig(tensor=layout.tensor, expert=layout.expert)
    initialize(parallel)
    description = describe(small_config())
    chunks = build_model(description, parallel, ModelConfig(dtype="bfloat16"))
    for parameter in chunks[0].parameters():
        parameter.data.fill_(1.0)  # memory that is there: zeros need not be
    ways = {
        "before": lambda: export_as_it_was(chunks, description),
        "after": lambda: export_hf(chunks, description, bucket_bytes=SMALL_BUCKET, everywhere=False),
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in ways}
    for _ in range(REPEATS):
        for variant, export in ways.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in export():
                pass
            dist.barrier()  # until the last rank is done
            seconds[variant].append(time.perf_counter() - start)
    return {variant: min(times) for variant, times in seconds.items()}


def export_as_it_was(chunks: list, description: ModelDescription) -> Iterator[torch.Tensor]:
    """To every rank, in the table's order."""
    everything = parameters(description, vocab_rows=chunks[0].vocab_size)
    mine = {parameter.name: tensor.detach() for parameter, tensor in local_parameters(chunks, description)}
    groups = Groups.here()
    gather = OnEveryRank(groups, mine)
    for bucket in table_buckets(everything, find_owners(everything, mine, description, groups), SMALL_BUCKET):
        for parameter, whole in zip(bucket.parameters, gather(bucket), strict=True):
            yield from parameter.transform.split(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    for ranks in parser.parse_args().ranks:
        for row in rows(ranks):
            print(row)
        for variant, (buckets, owners) in large_buckets(ranks).items():
            print(f"Qwen3-235B-A22B at {ranks} ranks, {variant}: {buckets} buckets, {owners} changes of owner")


if __name__ == "__main__":
    main()
