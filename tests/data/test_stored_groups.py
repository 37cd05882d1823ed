"""Groups in a file are those that were given, field by field; and what becomes of the file."""

import gc
import math
import os
import pickle
import resource
import tempfile
from datetime import date
from pathlib import Path

import pytest

from real_megatron.batch.types import Group, Trajectory
from real_megatron.data.lazy import TokenRows
from real_megatron.data.stored_groups import GroupWriter, StoredGroups
from real_megatron.errors import ConfigError, DataError

GROUPS = [
    Group([1, 2, 2**31 - 1], [], 3.5, "plain"),
    Group([], [], math.nan, "no label", {"nested": {"ä": [1, None, True, 0.1, 1e300, {"b": "🙂\u2028\n"}]}}),
    Group([7], [Trajectory([5, 6, 9, 8], 2, [True, True, False, True], finish_reason="given")], -1.0, "lone \ud800"),
    Group([7], [Trajectory([], None, finish_reason="length", forced_anchor=True, weight_version=3)], math.inf, ""),
    Group([4] * 3000, [Trajectory([5, 6], 1, [False, False], [-0.1, -2.0], [0.5, 1 / 3], text="a")], 2.0, "long"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_stored_groups_are_those_that_were_given() -> None:
    stored = StoredGroups.of(iter(GROUPS))
    assert len(stored) == 5 and repr([*stored]) == repr(GROUPS)  # NaN equals nothing
    assert repr(stored[-1]) == repr(GROUPS[-1]) and repr(stored[1:4:2]) == repr(GROUPS[1:4:2])
    with pytest.raises(IndexError):
        stored[5]
    assert stored.prompt_lengths.tolist() == [3, 0, 1, 1, 3000]
    assert stored.response_lengths.tolist() == [0, 0, 4, 0, 2]
    assert len(StoredGroups.of([])) == 0


def test_the_digest_is_of_everything_but_ids() -> None:
    digest = StoredGroups.of(GROUPS).digest
    assert StoredGroups.of([*GROUPS[:4], Group(**{**vars(GROUPS[4]), "example_id": "other"})]).digest == digest
    for change in ({"label": 1.0}, {"meta": {"a": 1}}, {"prompt_ids": [4]}, {"trajectories": []}):
        assert StoredGroups.of([*GROUPS[:4], Group(**{**vars(GROUPS[4]), **change})]).digest != digest
    # That of checkpoints of before: a run that has begun goes on.
    assert StoredGroups.of([Group([1], [], 2.0, "train-1")]).digest == "96beefafbc6257089f908aaf9f14a204"


def test_another_process_opens_the_same_file_which_has_no_name(place: Path) -> None:
    writer = GroupWriter()
    for group in GROUPS:
        writer.append(group)
        assert not os.listdir(place)  # whenever the process is killed, nothing is left
    stored = writer.finish()
    pickled = pickle.dumps(stored)
    opened = pickle.loads(pickled)
    assert repr([*opened]) == repr(GROUPS) and opened.digest == stored.digest
    assert not os.listdir(place)
    handle = stored._file.fileno()
    files = [os.fstat(one._file.fileno()) for one in (stored, opened)]
    assert os.path.samestat(*files)
    del stored, writer
    gc.collect()
    assert repr([*opened]) == repr(GROUPS)  # for as long as anybody maps it
    with pytest.raises(
        ConfigError, match=r"/proc/.*cannot be opened \(No such file.*: start the ranks of a host as one"
    ):
        pickle.loads(pickled)
    other = os.open(place / "other", os.O_RDWR | os.O_CREAT)
    os.dup2(other, handle)
    with pytest.raises(ConfigError, match=r"/proc/.*cannot be opened \(it is another file\)"):
        pickle.loads(pickled)
    for number in {other, handle}:
        os.close(number)


@pytest.mark.parametrize("room", [0, 9000])
def test_a_full_disk_is_one_error_that_names_the_place(room: int, place: Path) -> None:
    """While it is written, and at its end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=rf"^{place}: the tokens of the data cannot be written there \(File too"
        ) as e:
            StoredGroups.of(GROUPS[:1] if room == 0 else GROUPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TMPDIR" in str(e.value) and e.value.may_pass and not os.listdir(place)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(DataError, match=r"example a: its format puts into 'meta' what JSON cannot hold \(.* date"):
        StoredGroups.of([Group([1], [], 1.0, "a", {"when": date(2026, 1, 1)})])
    with pytest.raises(ValueError, match="example a has 2 responses"):
        StoredGroups.of([Group([1], [Trajectory([2], 0), Trajectory([2], 0)], 1.0, "a")])


def test_rows_of_tokens() -> None:
    rows = TokenRows()
    for row in ([1, 2], [], [3]):
        rows.append(row)
    assert len(rows) == 3 and [*rows] == [[1, 2], [], [3]] and rows[-1] == [3] and rows[:2] == [[1, 2], []]


def test_labels_of_aspects_are_kept() -> None:
    given = [Group([1], [], 2.0, "a", labels=(1.5, None)), Group([2], [], 3.0, "b")]
    stored = StoredGroups.of(given)
    assert list(stored) == given
    assert stored.digest != StoredGroups.of([Group([1], [], 2.0, "a", labels=(1.5, 2.0)), given[1]]).digest
