"""How a process joins the world, and what rank 0 finds, or fails at, for every rank."""

from pathlib import Path

import pytest
import torch.distributed as dist

from real_megatron.errors import ConfigError, refuse
from real_megatron.rollout.remote.ports import free_ports
from real_megatron.runtime import OtherRankFailed, from_rank_0, start_process_group
from tests.support.ranks import run_ranks


def found() -> list[int]:
    return from_rank_0(lambda: [dist.get_rank(), 7])


def failed() -> str:
    def fail() -> None:
        raise OSError("disk full")

    try:
        from_rank_0(fail)
    except (OSError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_all_ranks_get_what_rank_0_found() -> None:
    assert from_rank_0(lambda: 3) == 3
    assert run_ranks(2, found) == [[0, 7], [0, 7]]


def test_an_error_of_rank_0_ends_all() -> None:
    assert run_ranks(2, failed) == ["OSError: disk full", "OtherRankFailed: rank 0 failed: OSError: disk full"]


@pytest.mark.parametrize(("port", "may_pass"), [("no number", False), (None, True)])
def test_ranks_that_cannot_meet_may_meet_later(
    port: str | None, may_pass: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher starts them again where the network failed, not where an address is wrong."""
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or str(free_ports(1)[0])}
    for name, value in (address | {"REFUSED": str(tmp_path / "refused")}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the ranks cannot meet at MASTER_ADDR=127.0.0.1") as apart:
        start_process_group(timeout_minutes=0.02)
    refuse(apart.value)
    assert apart.value.may_pass == may_pass != (tmp_path / "refused").exists()


def test_tasks_of_slurm_without_torchrun_are_not_taken_for_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "32")
    with pytest.raises(ConfigError, match=r"Slurm has started 32 tasks, but no torchrun.*examples/launch/slurm.sbatch"):
        start_process_group(timeout_minutes=1)
