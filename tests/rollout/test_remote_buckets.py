"""Buckets carry every byte of a stream, in bounded memory."""

import torch

from real_megatron.rollout.remote.buckets import bucketed


def stream():
    g = torch.Generator().manual_seed(0)
    yield "a", torch.randn(3, generator=g).bfloat16()
    yield "b", torch.randn(5, 2, generator=g)
    yield "c", torch.randn(7, generator=g).bfloat16()
    yield "d", torch.arange(4)
    yield "e", torch.randn(1000, generator=g)
    yield "f", torch.randn((), generator=g)


def test_tensors_come_back_exactly():
    for limit in (1, 64, 10**6):
        buckets = list(bucketed(stream(), limit))
        back = {name: tensor for bucket in buckets for name, tensor in bucket.tensors()}
        for name, tensor in stream():
            assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
        assert sum(len(bucket.names) for bucket in buckets) == 6
        for bucket in buckets:
            assert bucket.flat.numel() <= limit or len(bucket.names) == 1
    assert len(list(bucketed(stream(), 10**6))) == 1 and len(list(bucketed(stream(), 1))) == 6


def test_floating_tensors_are_cast():
    back = {n: t for b in bucketed(stream(), 10**6, torch.float32) for n, t in b.tensors()}
    assert back["a"].dtype == torch.float32 and back["d"].dtype == torch.int64
    assert torch.equal(back["a"], dict(stream())["a"].float())


def test_a_bucket_does_not_alias_the_exporters_buffer():
    buffer = torch.zeros(4)

    def reused():
        for value in (1.0, 2.0):
            yield str(value), buffer.fill_(value)

    (bucket,) = bucketed(reused(), 10**6)
    assert {n: t[0].item() for n, t in bucket.tensors()} == {"1.0": 1.0, "2.0": 2.0}


def test_transposed_tensors():
    tensor = torch.arange(6.0).view(2, 3).t()
    (bucket,) = bucketed([("t", tensor)], 10**6)
    assert torch.equal(bucket.tensors()[0][1], tensor)
