"""What an evaluation has read so far is on disk, and what is there is what it has read."""

from pathlib import Path

import pytest

from real_megatron.errors import ConfigError
from real_megatron.judging.kept import KeptReadings
from real_megatron.judging.reading import Answer, Reading

ANSWER = Answer(expected=2.5, renormalized=2.6, sampled=3.0, probabilities=[0.1, 0.9])
ROWS = [
    [Reading("of é\u2028", ANSWER, False, False, 7)],
    [Reading("two", ANSWER, False, False, 1), Reading("", None, True, True, 9)],
]


def kept(path: Path, model: str = "a") -> KeptReadings:
    return KeptReadings(path, {"model": model})


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "below" / "kept.jsonl"
    first = kept(path)
    assert first.begin() == []
    first.add(ROWS[:1])
    first.add(ROWS[1:])
    assert kept(path).begin() == ROWS
    kept(path).end()
    assert not path.exists()


@pytest.mark.parametrize("missing", [1, 20])
def test_a_row_cut_short_is_read_again(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = kept(path)
    first.begin()
    first.add(ROWS)
    path.write_bytes(path.read_bytes()[:-missing])
    again = kept(path)
    assert again.begin() == ROWS[:1]
    again.add(ROWS[1:])
    assert kept(path).begin() == ROWS


def test_another_evaluations_rows_go(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = kept(path)
    first.begin()
    first.add(ROWS)
    assert kept(path, model="b").begin() == []
    assert kept(path, model="a").begin() == []


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = kept(path)
    first.begin()
    first.add(ROWS)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1].replace("critique", "x"), *lines[2:]]))
    with pytest.raises(ConfigError, match=r"kept.jsonl, line 2: damaged; remove the file"):
        kept(path).begin()


def test_a_disk_that_is_full_is_one_line_that_names_the_file() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match=r"/dev/full: cannot be written \(No space left .*: make room there, and run"):
        kept(full).add(ROWS)


def test_without_a_path_nothing_is_kept() -> None:
    nothing = KeptReadings(None, {})
    nothing.add(ROWS)
    assert nothing.begin() == []
    nothing.end()
