"""NCCL on both ends of a broadcast: the trainer's, and that of the environment which servers run in."""

import subprocess

import torch

from real_megatron.errors import ConfigError

_ASK = "import torch; print(*torch.cuda.nccl.version(), sep='.')"
_ASK_TIMEOUT_S = 120


def own_version() -> str:
    """Version of this process's NCCL, as 2.28.9."""
    return ".".join(map(str, torch.cuda.nccl.version()))


def check_nccl(python: str) -> None:
    """Raise ConfigError unless the environment of `python` has this process's version of NCCL.

    NCCL refuses a communicator of several versions (init.cc: "Mismatched NCCL version detected"), at the first
    broadcast, when models have been loaded. Servers do not report theirs (SGLang 0.5.21: neither /server_info nor
    /model_info has it, or torch's), so that attached ones cannot be asked.
    """
    own = own_version()
    try:
        asked = subprocess.run(
            [python, "-c", _ASK], capture_output=True, encoding="utf-8", errors="replace", timeout=_ASK_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.python: {python} cannot be asked for its version of NCCL: {error}") from None
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        raise ConfigError(f"rollout.python: the torch of {python} does not tell its version of NCCL: {reason}")
    theirs = asked.stdout.split()[-1]
    if theirs != own:
        raise ConfigError(
            f"the trainer has NCCL {own}, the servers' environment (rollout.python: {python}) NCCL {theirs}: NCCL "
            "broadcasts between equal versions only. Install the same nvidia-nccl package in both (the same torch "
            "brings it), or set rollout.weight_sync to disk"
        )
