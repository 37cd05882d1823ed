"""How a process joins the world, and what rank 0 finds, or fails at, for every rank."""

from pathlib import Path

import pytest
import torch.distributed as dist

from real_megatron.errors import ConfigError, DataError, refuse
from real_megatron.rollout.remote.ports import free_ports
from real_megatron.runtime import OtherRankFailed, from_rank_0, once_a_host, start_process_group
from tests.support.host_ranks import made_once
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


def test_the_first_rank_of_each_host_makes_what_its_others_get() -> None:
    """Two ranks of a host, and one of another."""
    assert once_a_host(lambda: 3) == 3
    made = [("made by 0", 1), ("made by 0", 0), ("made by 2", 1)]
    assert run_ranks(3, made_once) == made


@pytest.mark.parametrize(
    ("rank", "error", "ends"),
    [
        (
            0,
            DataError,
            ["DataError: bad row", "DataError: bad row", "OtherRankFailed: rank 0 failed: DataError: bad row"],
        ),
        (2, DataError, [*["OtherRankFailed: rank 2 failed: DataError: bad row"] * 2, "DataError: bad row"]),
        (0, OSError, ["OSError: bad row", *["OtherRankFailed: rank 0 failed: OSError: bad row"] * 2]),
    ],
)
def test_an_error_of_a_hosts_first_rank_ends_all(rank: int, error: type[Exception], ends: list[str]) -> None:
    """Of a fault of the data one rank of a host speaks for all (`on_every_rank`)."""
    assert [end for end, _ in run_ranks(3, made_once, (rank, error))] == ends


def test_a_rank_that_cannot_take_what_was_made_ends_all() -> None:
    failed = "OtherRankFailed: rank 1 failed: OSError: no such file"
    assert [end for end, _ in run_ranks(3, made_once, None, True)] == [failed, "OSError: no such file", failed]


@pytest.mark.usefixtures("no_process_group")
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


@pytest.mark.usefixtures("no_process_group")
def test_tasks_of_slurm_without_torchrun_are_not_taken_for_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "32")
    with pytest.raises(ConfigError, match=r"Slurm has started 32 tasks, but no torchrun.*examples/launch/slurm.sbatch"):
        start_process_group(timeout_minutes=1)
