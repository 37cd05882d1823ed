"""A directory is complete or absent."""

from pathlib import Path

import pytest

from real_megatron.errors import ConfigError
from real_megatron.hf.staging import discard, staged_directory


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_directory(output) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not output.exists()
    assert (output / "sub" / "file").read_text() == "x"
    assert list(output.parent.iterdir()) == [output]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_attempt_are_replaced(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "old").touch()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "new").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_a_second_attempt_does_not_remove_what_the_first_is_writing(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        with (
            pytest.raises(ConfigError, match="out is being written by another job"),
            staged_directory(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out/file").read_text() == "x"


def test_existing_output(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with staged_directory(empty) as staging:
        (staging / "file").touch()
    with pytest.raises(FileExistsError, match="exists already"), staged_directory(empty):
        pass
    assert (empty / "file").exists()


def test_a_removal_that_is_killed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged_directory(tmp_path / "out") as staging:
        (staging / "file").write_text("x")

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("real_megatron.hf.staging.shutil.rmtree", die)
        discard(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "file").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
