"""The errors of this package, by who can fix them.

`UserError` and its kinds: the user, who changed or chose something that cannot work. Shown as one message that names
the file, key or row and the fix.
`EngineError`: a rollout engine or one of its servers failed. Shown as one message, too.
`PromptRefused`: an engine cannot take one prompt. The only error that concerns a single row; all others end the job.
Everything else that escapes, ValueError and AssertionError included, is a bug of this package.
"""

import os
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Something that the user can fix. The message names the file, key or row, and the fix."""

    on_every_rank = False
    """All ranks of a node raise it alike, so that one of them says it."""
    may_pass = False
    """The same start may succeed later without any change: who or what was in the way may be gone."""


class ConfigError(UserError):
    """A configuration that cannot be used: a key, a combination of keys, or one that does not fit the machine."""

    on_every_rank = True


class OutputInUse(ConfigError):
    """Another job writes the output: perhaps one that is just ending, or whose lock a network file system keeps."""

    may_pass = True


class DataError(UserError):
    """A data file or record that cannot be used. The message begins with the file and its line or row."""

    on_every_rank = True


class CheckpointError(UserError):
    """A checkpoint that is missing, partial, damaged or of another model. The message names the file or tensor."""


class MissingCheckpoint(CheckpointError):
    """There is no checkpoint of that name, or its config.json or tokenizer cannot be used."""

    on_every_rank = True


class UnsupportedModel(UserError):
    """The model, or a feature that its configuration switches on, cannot be expressed in Megatron-Core here."""

    on_every_rank = True


class EngineError(Exception):
    """A rollout engine could not do what was asked: no server is left, a reply is not what was asked for, the model's
    scores are not numbers. The message says which and why."""


class PromptRefused(UserError):
    """An engine cannot take one of the prompts of a call, mostly because it is too long.

    `index` is the prompt's place in the call, so that the caller can go on without it.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type["PromptRefused"], tuple[int, str]]:
        return type(self), (self.index, str(self))


def refuse(error: Exception) -> None:
    """Tell a launcher, by the file that the environment names in REFUSED, that starting again would end the same way:
    only where the user has something to change."""
    if (file := os.environ.get("REFUSED")) and isinstance(error, UserError) and not error.may_pass:
        with suppress(OSError):
            Path(file).write_text(f"{error}\n", encoding="utf-8")
