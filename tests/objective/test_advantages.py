"""Advantages by hand, their invariants, and groups that are too small."""

import pytest
import torch

from real_megatron.objective.advantages import advantages, minimum_group_size

R = torch.tensor([1.0, 2.0, 6.0, -1.0, 3.0])
GROUP = torch.tensor([0, 0, 0, 1, 1])


def test_by_hand() -> None:
    torch.testing.assert_close(advantages(R, GROUP), torch.tensor([-3.0, -1.5, 4.5, -4.0, 4.0]))
    group_mean = advantages(R, GROUP, baseline="group_mean")
    torch.testing.assert_close(group_mean, torch.tensor([-2.0, -1.0, 3.0, -2.0, 2.0]))
    assert advantages(R, GROUP, baseline="none").tolist() == R.tolist()


def test_std_normalisation_uses_the_group_and_one_degree_of_freedom() -> None:
    got = advantages(R, GROUP, baseline="group_mean", std_normalize=True)
    std = torch.tensor([R[:3].std()] * 3 + [R[3:].std()] * 2)
    # 1e-6 is added to the standard deviation, which is about 2.7
    torch.testing.assert_close(got, torch.tensor([-2.0, -1.0, 3.0, -2.0, 2.0]) / std, rtol=1e-6, atol=0)


def test_clamp_comes_last() -> None:
    got = advantages(R, GROUP, std_normalize=True, clamp=1.0)
    free = advantages(R, GROUP, std_normalize=True)
    assert free.abs().max() > 1 and free.abs().min() < 1
    assert got.tolist() == free.clamp(-1, 1).tolist()


@pytest.mark.parametrize("std_normalize", [False, True])
@pytest.mark.parametrize("baseline", ["rloo", "group_mean"])
def test_equal_rewards_give_exactly_zero(baseline: str, std_normalize: bool) -> None:
    """Rounding of the mean, divided by a standard deviation of rounding, would look like a signal."""
    r, group = (-0.33 * torch.arange(1.0, 31)).repeat_interleave(7), torch.arange(30).repeat_interleave(7)
    in_float32 = torch.zeros(30).index_add(0, group, r) / 7
    assert (in_float32[group] != r).any(), "some of these means are rounded in float32"
    assert not advantages(r, group, baseline=baseline, std_normalize=std_normalize).any()


@pytest.mark.parametrize("baseline", ["rloo", "group_mean"])
def test_zero_mean_within_groups_and_blind_to_a_shift(baseline: str) -> None:
    g = torch.Generator().manual_seed(0)
    r = torch.randn(64, generator=g, dtype=torch.float64)
    group = torch.arange(8).repeat_interleave(8)
    a = advantages(r, group, baseline=baseline)
    assert a.view(8, 8).sum(1).abs().max() < 1e-13
    torch.testing.assert_close(advantages(r + 5.0, group, baseline=baseline), a, rtol=0, atol=1e-13)


def test_groups_do_not_mix_and_order_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(advantages(R[order], GROUP[order]), advantages(R, GROUP)[order])


def test_advantages_carry_no_gradient() -> None:
    assert not advantages(R.clone().requires_grad_(), GROUP).requires_grad


def test_a_single_response_is_refused_where_it_is_compared() -> None:
    single = torch.tensor([0, 0, 1])
    for settings in ({"baseline": "rloo"}, {"baseline": "group_mean"}, {"baseline": "none", "std_normalize": True}):
        with pytest.raises(ValueError, match="a group holds a single response.*Raise rollout.n"):
            advantages(R[:3], single, **settings)
        assert minimum_group_size(**settings) == 2
    assert advantages(R[:3], single, baseline="none").tolist() == [1.0, 2.0, 6.0]
    assert minimum_group_size("none") == 1


def test_nothing_in_nothing_out() -> None:
    assert advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
