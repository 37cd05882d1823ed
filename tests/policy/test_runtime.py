"""How a process joins the world."""

import pytest

from real_megatron.config import ParallelConfig
from real_megatron.policy.runtime import start_process_group


def test_tasks_of_slurm_without_torchrun_are_not_taken_for_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "32")
    with pytest.raises(ValueError, match=r"Slurm has started 32 tasks, but no torchrun.*examples/slurm/train.sbatch"):
        start_process_group(ParallelConfig())
