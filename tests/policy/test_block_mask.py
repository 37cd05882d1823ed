"""Block masks built in chunks against torch's own, which evaluates the dense mask at once."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from real_megatron.policy import block_mask as module


def admits(batch, head, q, k):
    """Causal in documents of 300 tokens that also see the first 150 tokens."""
    return ((q // 300 == k // 300) & (q >= k)) | (k < 150)


@pytest.mark.parametrize("queries, keys", [(1, 1), (128, 128), (1000, 1000), (257, 1024), (1024, 257)])
@pytest.mark.parametrize("chunk_bytes", [1, 2**17, 2**30])
def test_the_mask_equals_torchs(queries, keys, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    found = module.block_mask(admits, queries, keys, torch.device("cpu"))
    expected = create_block_mask(admits, None, None, queries, keys, device="cpu")
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in (f"{name}_num_blocks", f"{name}_indices"):
            assert torch.equal(getattr(found, part), getattr(expected, part)), part


def test_no_chunk_is_larger_than_its_limit(monkeypatch):
    """Memory stays linear in the keys: the mask is never asked for as a whole."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 2**19)
    asked = []

    def recorded(batch, head, q, k):
        asked.append(q.shape[0] * k.shape[1])
        return q >= k

    module.block_mask(recorded, 2048, 2048, torch.device("cpu"))
    assert max(asked) <= 2**19 and sum(asked) == 2048**2
