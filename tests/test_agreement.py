"""Ranks that were started with different files do not train together."""

import pytest
import torch.distributed as dist

from real_megatron.agreement import check_ranks_agree
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from tests.support.ranks import run_ranks

CONFIG = RunConfig()
INPUTS = {"data.train.0": "ab", "model.path: config.json": "cd"}


def told(facts: list[tuple[RunConfig, dict[str, str]]]) -> str:
    """What a rank is told, each with facts of its own."""
    try:
        check_ranks_agree(*facts[dist.get_rank()])
    except ConfigError as error:
        return str(error)
    return ""


def changed(**sections: dict[str, object]) -> RunConfig:
    return RunConfig.from_tree(sections)


def test_hosts_may_have_addresses_of_their_own() -> None:
    other = changed(rollout={"sync_host": "10.0.0.2"})
    assert run_ranks(2, told, [(CONFIG, INPUTS), (other, INPUTS)]) == ["", ""]


@pytest.mark.parametrize(
    ("config", "inputs", "line"),
    [
        (changed(optimizer={"lr": 0.5}), INPUTS, f"optimizer.lr: 0.5 there, {CONFIG.optimizer.lr!r} on rank 0"),
        (CONFIG, INPUTS | {"data.train.0": "xy"}, "data.train.0: 'xy' there, 'ab' on rank 0"),
        (CONFIG, {"data.train.0": "ab"}, "model.path: config.json: nothing there, 'cd' on rank 0"),
        (CONFIG, INPUTS | {"model.path: x": "1"}, "model.path: x: '1' there, nothing on rank 0"),
    ],
)
def test_what_differs_is_named_on_every_rank(config: RunConfig, inputs: dict[str, str], line: str) -> None:
    first, second = run_ranks(2, told, [(CONFIG, INPUTS), (config, inputs)])
    assert first == second
    assert first.startswith("rank 1 on ") and f"\n  {line}\nThe ranks that differ: 1. Start all" in first


def test_one_rank_has_nobody_to_agree_with() -> None:
    check_ranks_agree(CONFIG, INPUTS)
