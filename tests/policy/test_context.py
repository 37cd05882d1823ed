"""Context-parallel attention and its exchanges against one rank."""

import pytest
import torch

from real_megatron.batch.shards import shard_tokens
from real_megatron.policy.attention import segment_attention
from real_megatron.policy.flex import flex_segment_attention
from tests.support.policy_context import TREES, context_attention, context_logprobs
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attend", [segment_attention, flex_segment_attention])
def test_a_shard_gets_the_rows_of_its_tokens(attend, window):
    """Both implementations, forward: fp32, values of order 1."""
    torch.manual_seed(0)
    for tree in TREES.values():
        q, k, v = (torch.randn(tree.total, heads, 16) for heads in (4, 2, 2))
        whole = segment_attention(q, k, v, tree, 0.3, window)
        for shard in shard_tokens(tree.positions() + 1, 2):
            found = attend(q[shard.index()], k, v, tree, 0.3, window, shard)
            torch.testing.assert_close(found, whole[shard.index()], rtol=0, atol=1e-5)


def test_attention_over_ranks_equals_one_rank():
    """Forward and gradients: fp32 on the ranks against float64 on one, relative 1e-5."""
    for cases in run_ranks(4, context_attention, [2, 4]):
        for name, found, expected in cases:
            for a, b in zip(found, expected, strict=True):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_gathered_log_probs_take_their_gradient_once():
    """Each rank's rows get the gradient of the whole objective at those rows: not summed over ranks, not split."""
    for gathered, grad, expected, expected_grad in run_ranks(4, context_logprobs):
        assert torch.equal(gathered, expected)
        assert torch.equal(grad, expected_grad)
