"""Rank functions of runs whose ranks are on several hosts, as their local ranks say, each with files of its own."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from real_megatron.config import RunConfig
from real_megatron.errors import UserError
from real_megatron.judging import evaluate
from real_megatron.runtime import OtherRankFailed, once_a_host
from real_megatron.training import examples
from real_megatron.training.examples import prompt_groups, target_groups
from real_megatron.training.preparation import check_settings, prepare_together
from real_megatron.training.session import Session

LOCAL_RANKS = ["0", "1", "0"]
"""Two ranks of a host, and one of another."""


class Broken:
    """What cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _break, ()


def _break() -> None:
    raise OSError("no such file")


def outcome_of(action: Callable[[], Any]) -> Any:
    """What a rank gets from an action, or the error that ends it."""
    try:
        return action()
    except (UserError, OSError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"


def made_once(fails: tuple[int, type[Exception]] | None = None, broken: bool = False) -> tuple[Any, int]:
    """What ranks get of a host's first rank, and how often this one has been asked; `fails`: on that rank with that
    error."""
    asked = 0

    def make() -> Any:
        nonlocal asked
        asked += 1
        if fails is not None and dist.get_rank() == fails[0]:
            raise fails[1]("bad row")
        return Broken() if broken else f"made by {dist.get_rank()}"

    with own_host(LOCAL_RANKS):
        return outcome_of(lambda: once_a_host(make)), asked


@contextmanager
def own_host(local_ranks: list[str] | None, directory: Path | None = None) -> Iterator[pytest.MonkeyPatch]:
    """This rank on a host of its own choice: the local rank that a launcher has given it, and the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_RANK", raising=False)
        if local_ranks is not None:
            patch.setenv("LOCAL_RANK", local_ranks[dist.get_rank()])
        if directory is not None:
            patch.chdir(directory)
        yield patch


def data_of_ranks(config: RunConfig, local_ranks: list[str] | None, directories: list[Path]) -> Any:
    """What a rank has of the data: data sets that it has read itself, its groups and prompts, digests, and the files
    in the directory for temporary ones; or the error that ends it."""
    reads: list[str] = []
    with own_host(local_ranks, directories[dist.get_rank()]) as patch:
        patch.setattr(tempfile, "tempdir", str(directories[dist.get_rank()] / "tmp"))
        for module in (examples, evaluate):
            real = module.load_examples
            patch.setattr(
                module, "load_examples", lambda s, *a, real=real, **k: reads.append(s.path) or real(s, *a, **k)
            )

        def prepared() -> Any:
            load = prompt_groups if config.is_rl else target_groups
            found, digests = prepare_together(config, check_settings(config, dist.get_world_size()), load)
            sets = {name: [*test_set.prompts] for name, test_set in found.evaluation_sets.items()}
            return reads, [*found.data.groups], sets, digests, os.listdir(tempfile.tempdir)

        return outcome_of(prepared)


def error_on_own_host(config: RunConfig, directories: list[Path]) -> str:
    """The error with which a run ends whose ranks have a host and a working directory each."""
    with own_host(["0"] * len(directories), directories[dist.get_rank()]):
        with pytest.raises(UserError) as error:
            Session(config, prompt_groups)
    return str(error.value)
