"""A checkpoint exists whole or not at all."""

from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from real_megatron.training import checkpoints
from real_megatron.training.checkpoints import CheckpointStore
from tests.support.ranks import run_ranks


def write(path: Path) -> None:
    (path / "data").write_text(path.name)


def test_the_newest_is_the_highest_step_and_the_oldest_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    for step in (5, 10, 999_999, 1_000_000):  # the last outgrows the padded name
        store.save(step, write)
    assert store.newest() == (1_000_000, tmp_path / "checkpoints/step-1000000")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-1000000", "step-999999"]


def test_a_save_that_dies_is_never_resumed_from(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write)

    def die(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(2, die)
    assert store.newest() == (1, tmp_path / "step-000001")
    store.save(3, write)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def saved_apart(root: Path) -> str:
    """Each rank with a directory of its own, as on nodes without a shared file system."""
    directory = root / str(dist.get_rank())
    directory.mkdir()
    patience, checkpoints._VISIBLE_S = checkpoints._VISIBLE_S, 0
    try:
        CheckpointStore(directory, keep=1).save(1, write)
    except OSError as error:
        return str(error)
    finally:
        checkpoints._VISIBLE_S = patience
    return "saved"


def test_ranks_that_see_different_file_systems_save_nothing(tmp_path: Path) -> None:
    for message in run_ranks(2, saved_apart, tmp_path):
        assert "is not seen by 1 of 2 ranks (the first: 1): put `output` on a file system that all nodes" in message
    assert not list(tmp_path.rglob("step-000001"))


@pytest.mark.parametrize("kind", ["torch", "megatron"])
def test_a_full_disk_is_one_line_that_says_what_to_do(kind: str, tmp_path: Path) -> None:
    """Torch's exception is no Exception, and its text is every rank's traceback."""
    reason = RuntimeError("Worker failure: [Errno 28] No space left on device")
    failures = {rank: (reason, None) for rank in (0, 1)}
    error = CheckpointException("write", failures) if kind == "torch" else CheckpointingException(str(reason))

    def fail(path: Path) -> None:
        raise error

    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write)
    with pytest.raises(OSError) as found:
        store.save(2, fail)
    assert str(found.value) == (
        f"{tmp_path}/step-000002.partial: cannot be written ({reason}): make room there, and run the same command "
        "again to go on"
    )
    assert store.newest() == (1, tmp_path / "step-000001")


def test_a_removal_that_dies_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write)

    def die(path: Path) -> None:
        (Path(path) / "data").unlink()
        raise OSError("gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr("real_megatron.training.checkpoints.shutil.rmtree", die)
        store.save(2, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001.partial", "step-000002"]
    store.clear()  # the next start, where no save may come behind it
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    store.save(3, write)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, write)
    store.save(1, lambda path: (path / "data").write_text("second") and None)
    assert (tmp_path / "step-000001/data").read_text() == "second"


class Writing:
    """A save under way, as a store sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ready, self.ended = directory, False, False

    def done(self) -> bool:
        return self.ready

    def finish(self) -> None:
        write(self.directory)

    def give_up(self) -> None:
        self.ended = True


def test_a_save_under_way_is_published_when_it_is_done_and_before_the_next(tmp_path: Path) -> None:
    store, saves = CheckpointStore(tmp_path, keep=3), []

    def begin(path: Path) -> Writing:
        saves.append(Writing(path))
        return saves[-1]

    store.begin(1, begin)
    store.settle(wait=False)
    assert store.newest() is None
    saves[0].ready = True
    store.settle(wait=False)
    assert store.newest() == (1, tmp_path / "step-000001")
    store.begin(2, begin)
    store.begin(3, begin)
    assert store.newest() == (2, tmp_path / "step-000002")
    store.settle()
    assert store.newest() == (3, tmp_path / "step-000003")
    assert all((path / "data").exists() for path in tmp_path.iterdir())
    store.begin(4, begin)
    store.give_up()
    store.settle()
    assert saves[-1].ended and store.newest() == (3, tmp_path / "step-000003")


def published_where_all_are_done(root: Path) -> list[bool]:
    """Whether the checkpoint is there: when rank 0 alone has written, and when both have."""
    store, save, found = CheckpointStore(root, keep=1), Writing(root), []
    store.begin(1, lambda path: save)
    for done in (dist.get_rank() == 0, True):
        save.ready = done
        store.settle(wait=False)
        found.append(store.newest() is not None)
    return found


def test_a_save_under_way_is_published_when_all_ranks_have_written(tmp_path: Path) -> None:
    assert run_ranks(2, published_where_all_are_done, tmp_path) == [[False, True]] * 2


def test_torchs_own_error_of_a_full_disk_is_explained(tmp_path: Path) -> None:
    """Of its C++ stream: no OSError, and nothing in it about a disk."""

    def fail(path: Path) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with pytest.raises(
        OSError, match=r"step-000001.partial: cannot be written \(torch's file stream .* make room there"
    ):
        CheckpointStore(tmp_path, keep=1).save(1, fail)

    def other(path: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        CheckpointStore(tmp_path, keep=1).save(1, other)
