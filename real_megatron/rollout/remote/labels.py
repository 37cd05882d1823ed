"""Names of weights on servers: whose they are, and whether a server still holds what it has loaded itself."""

import re
import secrets
from pathlib import Path

from real_megatron.rollout.remote.errors import WrongServer

_LABEL = re.compile(r"[0-9a-f]{8}-\d+(-incomplete)?")


class Labels:
    """`RUN-VERSION`; RUN is random for every engine, so that labels of another run's weights never pass for ours."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(4)

    def of(self, version: int) -> str:
        return f"{self._run}-{version}"


def incomplete(label: str) -> str:
    """The name of weights while they are replaced by those of `label`."""
    return f"{label}-incomplete"


def check_loaded(url: str, model_path: str, label: str, wanted: Path) -> None:
    """Raise WrongServer unless a server holds the checkpoint `wanted`, as it has loaded it.

    model_path, label: what the server says of its weights
    """
    if _LABEL.fullmatch(label):
        raise WrongServer(f"{url} holds weights of a training run ({label}): restart it with --model-path {wanted}")
    if Path(model_path).resolve() != wanted.resolve():
        raise WrongServer(f"{url} serves {model_path}, asked for is {wanted}: start it with that path")
