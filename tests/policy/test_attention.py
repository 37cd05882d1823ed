"""Packed attention, both implementations, against dense masked attention in float64."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import shard_tokens
from real_megatron.hf.rotary import Rotary
from real_megatron.policy import flex
from real_megatron.policy.attention import PackedAttention, PackedParams, segment_attention
from real_megatron.policy.flex import flex_segment_attention
from real_megatron.policy.rope import rotary_embedding
from real_megatron.policy.runs import runs_of
from tests.support.trees import random_tree

TREE = SegmentTree(
    (Segment(5), Segment(3, 0), Segment(1, 1), Segment(2, 1), Segment(1, 0), Segment(4, 0), Segment(6), Segment(2))
    + (Segment(3, 7),)
)


def dense(q, k, v, tree, scale, window):
    """softmax(QKᵀ·scale + mask)V with the tree's dense mask: the definition."""
    repeats = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree.mask(window), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def inputs(heads, kv_heads, dim=16, tree=TREE):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tree.total, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(attend, tensors, dtype, window, tree=TREE):
    q, k, v, grad = (x.to(dtype) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, tree, 0.3, window)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


every_mask = pytest.mark.parametrize("window", [None, 1, 3, 4, 6])
every_grouping = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])


def close(found, expected):
    """fp32 against float64: values of order 1, sums over at most 9 keys: 1e-5 of that."""
    return all((a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()) for a, b in zip(found, expected, strict=True))


@every_mask
@every_grouping
def test_forward_and_gradients_equal_dense_attention(window, heads, kv_heads):
    tensors = inputs(heads, kv_heads)
    expected = run(dense, tensors, torch.float64, window)
    assert close(run(segment_attention, tensors, torch.float32, window), expected)


def over_ranks(attend, ranks):
    """`attend` on the shards of so many ranks one after the other, their rows in packing order."""

    def whole(q, k, v, tree, scale, window):
        shards = shard_tokens(tree.positions() + 1, ranks)
        rows = torch.cat([attend(q[s.index()], k, v, tree, scale, window, s) for s in shards])
        return rows[torch.cat([s.index() for s in shards]).argsort()]

    return whole


@pytest.mark.parametrize(("seed", "ranks", "heads", "kv_heads"), [(0, 2, 4, 4), (8, 3, 4, 2), (9, 4, 6, 1)])
def test_deep_trees_equal_dense_attention(seed, ranks, heads, kv_heads):
    """Forward and gradients in float64, on one rank and on 2 to 4: sums over at most 530 tokens of values of order 1,
    to 1e-11. The trees have segments that share a call and segments that take one each."""
    tree = random_tree(seed, multiple=ranks)
    tensors = inputs(heads, kv_heads, tree=tree)
    calls = runs_of(tree, heads * 16, None, None, torch.device("cpu")).runs
    assert 1 < len(calls) < sum(length > 0 for length in tree.lengths)
    for window in (None, 3, 120):
        expected = run(dense, tensors, torch.float64, window, tree)
        for attend in (segment_attention, over_ranks(segment_attention, ranks)):
            for a, b in zip(run(attend, tensors, torch.float64, window, tree), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_of_flex_attention_is_the_trees(seed):
    """Asked pair by pair as the kernel asks it, on one rank and on each of several."""
    tree = random_tree(seed, multiple=3)
    for window in (None, 3, 120):
        mask = tree.mask(window)
        for shard in (None, *shard_tokens(tree.positions() + 1, 3)):
            rows = torch.arange(tree.total) if shard is None else shard.index()
            found = flex._mask(tree, window, shard, torch.device("cpu"))
            zero, q, k = torch.tensor(0), torch.arange(rows.numel())[:, None], torch.arange(tree.total)
            assert torch.equal(found.mask_mod(zero, zero, q, k), mask[rows])


def test_flex_forward_on_a_deep_tree_equals_dense_attention():
    """With segments over several blocks, and blocks of several segments."""
    tree = random_tree(11, multiple=2)
    q, k, v, _ = inputs(4, 2, tree=tree)
    for window in (None, 120):
        expected = dense(q, k, v, tree, 0.3, window)
        for attend in (flex_segment_attention, over_ranks(flex_segment_attention, 2)):
            assert close([attend(q.float(), k.float(), v.float(), tree, 0.3, window)], [expected])


@every_mask
@every_grouping
def test_flex_forward_equals_dense_attention(window, heads, kv_heads):
    """Torch has flex_attention's backward on GPUs only; its mask, the part that is ours, is the same there."""
    q, k, v, _ = inputs(heads, kv_heads)
    expected = dense(q, k, v, TREE, 0.3, window)
    found = flex_segment_attention(q.float(), k.float(), v.float(), TREE, 0.3, window)
    assert close([found], [expected])


def test_every_thread_may_compile_as_often(monkeypatch):
    """Autograd's threads, which recompute, too: torch's own limit is 8. The kernel here is Python, compiled anew for
    every word."""
    monkeypatch.setattr(flex, "flex_attention", lambda x, word: x + len(word))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flex._kernel.cache_clear()
    x = torch.zeros(3)

    def run() -> list[float]:
        return [flex._compiled(x, "a" * n)[0].item() for n in range(12)]

    try:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(run).result() == run() == [float(n) for n in range(12)]
    finally:
        flex._kernel.cache_clear()


def test_a_prompts_gradient_sums_over_its_responses():
    """The prompt's key gradient equals the sum over separate sequences that each hold a copy of the prompt."""
    torch.manual_seed(0)
    lengths, prompt = [3, 2, 4], 5
    shared = SegmentTree((Segment(prompt), *(Segment(n, 0) for n in lengths)))
    q, k, v = (torch.randn(shared.total, 2, 8, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(shared.total, 2, 8, dtype=torch.float64)
    weight[:prompt] = 0
    key = k.clone().requires_grad_()
    (segment_attention(q, key, v, shared, 0.5) * weight).sum().backward()
    total = torch.zeros_like(key[:prompt])
    start = prompt
    for n in lengths:
        rows = torch.cat((torch.arange(prompt), torch.arange(start, start + n)))
        copy = k[rows].clone().requires_grad_()
        out = segment_attention(q[rows], copy, v[rows], SegmentTree((Segment(prompt + n),)), 0.5)
        (out * weight[rows]).sum().backward()
        total += copy.grad[:prompt]
        start += n
    torch.testing.assert_close(key.grad[:prompt], total, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_mask
@every_grouping
def test_flex_gradients_equal_dense_attention_on_a_gpu(window, heads, kv_heads):
    tensors = inputs(heads, kv_heads)
    expected = run(dense, tensors, torch.float64, window)
    found = run(flex_segment_attention, [x.cuda() for x in tensors], torch.float32, window)
    assert close([x.cpu() for x in found], expected)


@pytest.mark.parametrize("dim", [16, 10], ids=["whole head", "part of a head"])
def test_a_scaled_rotation_is_that_of_scaled_cosines_and_sines(dim):
    """transformers multiplies both by the scaling, which leaves dimensions that are not rotated as they are. float64:
    the two differ in the order of three products."""
    rotary = Rotary("yarn", torch.rand(dim // 2), scaling=1.3)
    angles = rotary_embedding(rotary.frequencies, TREE.positions()).double()
    q, k, v, _ = (x[:, None] for x in inputs(4, 2))
    params, results = PackedParams(tree=TREE), []
    for applied, left in ((rotary.scaling, None), (1.0, rotary)):
        module = PackedAttention(None, 1, None, "self", softmax_scale=0.3, rotary=left)
        turned = [_apply_rotary_pos_emb_bshd(x, angles, mscale=applied) for x in (q, k)]
        results.append(module(*turned, v, None, packed_seq_params=params))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
