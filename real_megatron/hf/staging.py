"""A directory that appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_megatron.files import writing
from real_megatron.hf.output import check_output
from real_megatron.locks import only_writer


def check_new(output: str | Path) -> None:
    """Raise FileExistsError when `output` exists and is not empty, ConfigError when it cannot be made."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another output or remove it")
    check_output(output.parent, "output")


@contextmanager
def staged_directory(output: str | Path) -> Iterator[Path]:
    """Yield a hidden directory beside `output`; on success flush it to disk and rename it to `output`.

    On an exception it is removed; a full disk is an OSError that names the output and the fix. A killed process leaves
    only the hidden directory `.<name>.partial`, which the next attempt removes. Raises as `check_new`, and ConfigError
    while another process writes it.
    """
    output = Path(output)
    check_new(output)
    with only_writer(output):
        check_new(output)  # another may have written it meanwhile
        partial = _hidden(output)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            with writing(output):
                yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            if output.exists():
                output.rmdir()
            partial.rename(output)
            _sync(output.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def discard(output: Path) -> None:
    """Remove what `staged_directory` has made, at once: a killed removal leaves only the hidden directory."""
    partial = _hidden(output)
    if partial.exists():
        shutil.rmtree(partial)
    output.rename(partial)
    shutil.rmtree(partial)


def _hidden(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
