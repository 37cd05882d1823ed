"""A file is the old one or the new one, and an error of a write names it."""

import errno
import os
from pathlib import Path

import pytest

from real_megatron.files import Vanished, append, check_in_place, replace_text, writing


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    replace_text(file, "old\n")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        replace_text(file, "new\n")
    assert file.read_text() == "old\n"
    replace_text(file, "a\ud800\n")
    assert file.read_bytes() == b"a\\ud800\n" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.ENOSPC, "No space left on device): make room there, and run the same command again"),
        (errno.EDQUOT, "make room there"),
        (errno.ENOENT, "its directory was removed or renamed"),
        (errno.EIO, "Input/output error)"),
    ],
)
def test_an_error_of_a_write_names_file_and_fix(number: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, writing(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"{tmp_path}/file: cannot be written (") and said in str(error.value)


def test_all_is_written_to_the_file_that_the_path_names(tmp_path: Path) -> None:
    file = tmp_path / "file"
    handle = os.open(file, os.O_WRONLY | os.O_CREAT)
    append(handle, b"x" * 100_000)
    check_in_place(file, handle)
    file.rename(tmp_path / "away")
    for other in (lambda: None, file.touch):
        other()
        with pytest.raises(Vanished, match="removed or renamed"):
            check_in_place(file, handle)
    os.close(handle)
    assert (tmp_path / "away").stat().st_size == 100_000
