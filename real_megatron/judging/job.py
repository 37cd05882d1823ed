"""A job that writes a file and can be interrupted: its settings are kept beside the output, to go on with the same."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from real_megatron.data import load_template
from real_megatron.errors import ConfigError


def job_path(output: Path) -> Path:
    """Where the settings of the job that writes `output` are kept."""
    return output.with_name(output.name + ".job.json")


def keep_settings(output: Path, settings: dict[str, Any], begun: bool) -> None:
    """Keep the settings of a new job; where one has begun, refuse to go on with other settings.

    Raises ConfigError, naming each setting that differs, or when the settings of a job that has begun are gone.
    """
    settings = json.loads(json.dumps(settings))
    path = job_path(output)
    if not begun:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8 text
        return
    if not path.exists():
        raise ConfigError(f"{output} exists, but {path.name} does not, so it cannot be resumed: choose another output")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{path} is damaged, so that {output} cannot be resumed: choose another output, or remove both"
        ) from None
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        what = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise ConfigError(f"{output} was begun with other settings ({what}): choose another output, or use the same")


def weights_written(checkpoint: Path) -> str | None:
    """When the newest weights in a directory were written, since a later training may replace them."""
    newest = max((path.stat().st_mtime for path in checkpoint.glob("*.safetensors")), default=None)
    return None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat()


def template_digest(template: str) -> str:
    """A digest of a template's text (`data.template`), which may change while its name stays."""
    return hashlib.blake2b(load_template(template).text.encode(), digest_size=8).hexdigest()
