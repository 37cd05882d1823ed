"""Metrics and vectors of several ranks as tensors: bit for bit what each rank had, in rank order."""

import torch

from tests.support.gathering_ranks import gather, gather_vectors, metrics_of
from tests.support.ranks import run_ranks


def same(found, expected):
    assert [list(metrics) for metrics in found] == [list(metrics) for metrics in expected]
    for metrics, wanted in zip(found, expected, strict=True):
        for name, value in metrics.items():
            assert value.shape == wanted[name].shape, name
            assert torch.equal(value.double(), wanted[name].double()), name


def test_metrics_of_all_ranks_with_samples_of_several_sizes():
    for found in run_ranks(3, gather):
        same(found, [metrics_of(rank) for rank in range(3)])


def test_a_rank_with_other_metrics_than_the_rest():
    expected = [metrics_of(0), {"loss": metrics_of(1)["loss"]}, metrics_of(2)]
    for found in run_ranks(3, gather, 1):
        same(found, expected)


def test_vectors_of_several_sizes():
    for sizes in ([2, 0, 3], [0, 0, 0]):
        for found in run_ranks(3, gather_vectors, sizes):
            assert [row.tolist() for row in found] == [[float(rank)] * size for rank, size in enumerate(sizes)]
