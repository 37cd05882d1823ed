"""Weights kept in host memory: their memory is used again by the next sync."""

import weakref

import pytest
import torch

from real_megatron.rollout.remote.buckets import WeightBucket
from real_megatron.rollout.remote.kept import KeptWeights


def bucket(value: int, size: int = 16, device: str = "cpu") -> WeightBucket:
    return WeightBucket(["a"], [torch.uint8], [[size]], torch.full((size,), value, dtype=torch.uint8, device=device))


def keep(kept: KeptWeights, *buckets: WeightBucket) -> list[tuple[int, int]]:
    """Replace the set; address and value of each bucket. A bucket changes as soon as it may."""
    kept.begin()
    for one in buckets:
        assert kept.buckets is None
        kept.add(one)
        kept.wait()
        one.flat.zero_()
    kept.finish()
    found = kept.buckets
    assert all(one.flat.device.type == "cpu" and len(one.flat.unique()) == 1 for one in found)
    return [(one.flat.data_ptr(), int(one.flat[0])) for one in found]


def test_the_next_set_lies_in_the_memory_of_the_last(caplog):
    kept = KeptWeights(copies=True)
    assert kept.buckets is None
    (a, one), (b, two) = keep(kept, bucket(1), bucket(2))
    assert (one, two) == (1, 2)
    assert keep(kept, bucket(3), bucket(4)) == [(a, 3), (b, 4)]
    # Nor is that of a sync which failed lost, whether its copies had been waited for or not.
    kept.begin()
    kept.add(bucket(9))
    kept.begin()
    assert kept.buckets is None
    assert keep(kept, bucket(5), bucket(6)) == [(a, 5), (b, 6)]
    # Without a GPU there is nothing to pin for, which is said once.
    (record,) = caplog.records
    assert "host memory cannot be pinned" in record.getMessage()


def test_other_sizes_give_the_old_memory_back():
    kept = KeptWeights(copies=True)
    keep(kept, bucket(1), bucket(2), bucket(3))
    old = [weakref.ref(one.flat) for one in kept.buckets]
    kept.begin()
    kept.add(bucket(4))
    kept.wait()
    kept.add(bucket(5, size=17))
    kept.wait()
    assert [ref() is None for ref in old] == [False, True, True]
    kept.finish()
    assert [int(one.flat.numel()) for one in kept.buckets] == [16, 17]


def test_buckets_in_host_memory_are_kept_as_they_are():
    kept = KeptWeights(copies=False)
    kept.begin()
    first = bucket(1)
    kept.add(first)
    kept.wait()
    kept.finish()
    assert kept.buckets == [first]
    old = weakref.ref(first.flat)
    del first
    kept.begin()
    assert old() is None, "the old set goes before the new one comes"


def test_a_copy_that_fails_is_an_error_of_that_sync_alone():
    kept = KeptWeights(copies=True)
    kept.begin()
    kept.add(bucket(0, device="meta"))
    with pytest.raises(NotImplementedError):
        kept.wait()
    kept.begin()
    kept.add(bucket(0, device="meta"))
    assert [value for _, value in keep(kept, bucket(7))] == [7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kept_weights_are_pinned_on_a_gpu(caplog):
    kept = KeptWeights(copies=True)
    size = 2**20 + 3  # no power of two, no whole number of pages
    first = keep(kept, *(bucket(i, size, "cuda") for i in (1, 2)))
    assert all(one.flat.is_pinned() for one in kept.buckets)
    second = keep(kept, *(bucket(i, size, "cuda") for i in (3, 4)))
    assert [at for at, _ in second] == [at for at, _ in first] and [value for _, value in second] == [3, 4]
    big = torch.randint(0, 256, (2**26,), dtype=torch.uint8, device="cuda")
    kept.begin()
    kept.add(WeightBucket(["a"], [torch.uint8], [[2**26]], big))
    kept.wait()
    kept.finish()
    assert torch.equal(kept.buckets[0].flat, big.cpu())
    assert not caplog.records
