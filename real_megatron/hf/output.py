"""Whether results can be written, before the work for them is done."""

import os
from pathlib import Path

from real_megatron.errors import ConfigError


def check_output(directory: Path, key: str) -> None:
    """Raise ConfigError unless files can be written in `directory`, which need not be there yet.

    key: what names it, for the message
    """
    nearest = nearest_path(directory)
    if not nearest.is_dir():
        raise ConfigError(f"{key}: {directory} cannot be a directory, since {nearest} is a file: choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {directory} cannot be written: {nearest} is read-only for this user; choose another")


def nearest_path(path: Path) -> Path:
    """The path itself, or the nearest of the directories above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def check_output_file(file: Path, key: str) -> None:
    """Raise ConfigError unless `file` can be written, or made."""
    check_output(file.parent, key)
    if file.is_dir():
        raise ConfigError(f"{key}: {file} is a directory: name a file in it")
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{key}: {file} is read-only for this user: choose another")
