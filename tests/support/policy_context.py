"""Rank functions of the context-parallel tests."""

import torch
import torch.distributed as dist
from torch import Tensor

from real_megatron.batch.context import Exchange
from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import shard_tokens
from real_megatron.config import ParallelConfig
from real_megatron.policy import cpu, parallel_groups
from real_megatron.policy.attention import PackedAttention, PackedParams, segment_attention
from real_megatron.policy.context import gather_logprobs

TREES = {
    "shared prompts": SegmentTree(
        (Segment(13), Segment(7, 0), Segment(1, 0), Segment(9, 0), Segment(6), Segment(4, 4))
    ),
    "branches of responses": SegmentTree(
        (Segment(150), Segment(90, 0), Segment(2, 1), Segment(1, 1), Segment(130, 0), Segment(1, 4), Segment(2, 5))
    ),
    "separate sequences": SegmentTree((Segment(17), Segment(2), Segment(21))),
}


def context_attention(sizes: list[int]) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """`PackedAttention` at each context-parallel size: output and gradients of this rank's tokens, and one rank's."""
    cases = []
    for size in sizes:
        parallel_groups.initialize(ParallelConfig(context=size))
        rank = dist.get_rank() % size
        for name, tree in TREES.items():
            shards = shard_tokens(tree.positions() + 1, size)
            index = shards[rank].index()
            slots = torch.cat([shard.index() for shard in shards]).argsort()
            params = PackedParams(tree=tree, exchange=Exchange(shards[rank], slots, torch.zeros(0), 1))
            for window in (None, 3, 11):
                for heads, groups in ((4, 4), (6, 2)):
                    generator = torch.Generator().manual_seed(0)
                    shapes = [(tree.total, n, 16) for n in (heads, groups, groups, heads)]
                    *inputs, grad = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

                    leaves = [x.clone().requires_grad_() for x in inputs]
                    whole = segment_attention(*leaves, tree, 0.3, window)
                    whole.backward(grad)
                    expected = [x[index] for x in (whole.detach(), *(leaf.grad for leaf in leaves))]

                    module = PackedAttention(None, 1, None, "self", softmax_scale=0.3, windows=(window,))
                    leaves = [x[index].float().requires_grad_() for x in inputs]
                    with cpu.device_mode():
                        out = module(*(leaf[:, None] for leaf in leaves), None, packed_seq_params=params)
                        out = out.view(index.numel(), heads, 16)
                        out.backward(grad[index].float())
                    found = [out.detach(), *(leaf.grad for leaf in leaves)]
                    cases.append((f"CP {size}, {name}, window {window}, {heads}/{groups}", found, expected))
    return cases


def context_logprobs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uneven numbers of log-probs (one of them 0), gathered: result and gradient here, and what both should be."""
    parallel_groups.initialize(ParallelConfig(context=4))
    rank, counts, width = dist.get_rank(), [3, 0, 1, 2], 3
    expected = torch.tensor([0.5, 0.25, 4.0, 8.0, 1.0, 2.0])
    owner = torch.tensor([3, 0, 2, 0, 3, 0])
    slots = torch.empty(6, dtype=torch.long)
    for r, count in enumerate(counts):
        slots[owner == r] = r * width + torch.arange(count)
    mine = expected[owner == rank].requires_grad_()
    weight = torch.arange(1.0, 7.0)
    with cpu.device_mode():
        gathered = gather_logprobs(mine, slots, width)
        (gathered * weight).sum().backward()
    return gathered.detach(), mine.grad, expected, weight[owner == rank]
