"""What went wrong with a distributed checkpoint, in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

# Torch's zip files: what its C++ stream raises on a full disk, or for a file that is cut short.
_TORCH_STREAM = re.compile(r"inline_container|PytorchStream|iostream")


@contextmanager
def explain_checkpoint_errors(what: str, fix: str) -> Iterator[None]:
    """Turn the errors of checkpointing, which hold every rank's whole traceback, into an OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        reasons = dict.fromkeys(_reason(failure) for failure, _ in error.failures.values())
        raise OSError(f"{what} ({'; '.join(reasons)}): {fix}") from error
    except (CheckpointingException, KeyError, TypeError) as error:  # TypeError: metadata.json of other keys
        raise OSError(f"{what} ({_reason(error)}): {fix}") from error
    except RuntimeError as error:
        if not _TORCH_STREAM.search(str(error)):
            raise
        raise OSError(f"{what} (torch's file stream has failed: {_reason(error)}): {fix}") from error


def _reason(failure: BaseException) -> str:
    text = " ".join(str(failure).split())
    if isinstance(failure, KeyError):  # the name that was looked up, and then often all names that there are
        name = text.strip("'\"").partition(" ")[0]
        return f"it has no {name}"
    return text
