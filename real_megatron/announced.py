"""What the environment announces of this process: its rank, the world, the tasks of Slurm. Needs no torch."""

import os

from real_megatron.errors import ConfigError

START = "start ranks with torchrun, which sets such variables, or unset them"
"""What to do about variables that do not fit."""


def check_announced() -> None:
    """Raise ConfigError where the variables of the environment that announce a rank do not fit together, and for one
    of several tasks that Slurm has started without torchrun: each would be a run of its own."""
    found: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise ConfigError(f"{name}={text!r} in the environment is no number: {START}")
        if text is not None:
            found[name] = int(text)
    if "RANK" in found and found["RANK"] >= found.get("WORLD_SIZE", 1):
        world = f"WORLD_SIZE={found['WORLD_SIZE']}" if "WORLD_SIZE" in found else "WORLD_SIZE, which is not set"
        error = ConfigError(f"RANK={found['RANK']} in the environment is not below {world}: {START}")
        error.on_every_rank = False  # none else may be there to say it
        raise error
    if "RANK" not in found and found.get("SLURM_STEP_NUM_TASKS", 1) > 1:
        raise ConfigError(
            f"Slurm has started {found['SLURM_STEP_NUM_TASKS']} tasks, but no torchrun: start one task a node, and in "
            "it `torchrun --nnodes … -m real_megatron …` (examples/launch/slurm.sbatch)"
        )
