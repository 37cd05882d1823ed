"""Bad inputs as rows of tables: one mistake each, made as a user makes it, and the one message that it gives."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from real_megatron.cli import app
from real_megatron.data.byte_model import make_byte_model
from tests.support.command_line import own_logging

RUN = """\
output: out
steps: 2
model: {path: model}
batch: {prompts: 2}
data:
  train: [{path: train.jsonl}]
  max_response_tokens: 8
"""
ROWS = [{"id": f"row {i}", "prompt": f"Rate answer {i}.", "label": 1 + i % 5, "cot": "Fine."} for i in range(6)]
TRAIN = "train run.yaml --dry-run"
JUDGE = "judge --model model --input train.jsonl --output out.jsonl data.max_response_tokens=4"
CONVERT = "convert to-megatron model out --workers 1"


@dataclass(frozen=True)
class Bad:
    """A mistake in an otherwise good directory, and what the command says of it."""

    name: str
    message: str
    """A regular expression that the message behind `error: ` begins with, its white space as single spaces."""
    command: str = TRAIN
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Files that are written over the good ones."""
    make: Callable[[], Any] | None = None
    """Called in the directory, behind the files, for what is no file to write."""
    env: Mapping[str, str] = field(default_factory=dict)
    mended: bool = True
    """Whether the same command succeeds with the good files: the mistake is in files or the environment."""


def table(*rows: Bad) -> pytest.MarkDecorator:
    """A parametrised test of each row, under its name."""
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


def make_base(directory: Path) -> Path:
    """A good directory: a model, data, a configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    make_byte_model(directory / "model", num_hidden_layers=1, max_position_embeddings=4096)
    (directory / "train.jsonl").write_text(jsonl(ROWS))
    (directory / "run.yaml").write_text(RUN)
    return directory


def jsonl(rows: list[Any]) -> str:
    """Rows as the lines of a file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(**fields: Any) -> str:
    """The good rows, the second of which has other fields; None takes a field away."""
    changed = {key: value for key, value in {**ROWS[1], **fields}.items() if value is not None}
    return jsonl([ROWS[0], changed, *ROWS[2:]])


def set_json(file: str, **fields: Any) -> Callable[[], None]:
    """Change fields of a JSON file; None takes one away."""

    def change() -> None:
        tree = {**json.loads(Path(file).read_text()), **fields}
        Path(file).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return change


def set_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    """Change the tensors of the model's file of weights."""

    def rewrite() -> None:
        weights = Path("model/model.safetensors")
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, {"format": "pt"})

    return rewrite


def contents(directory: Path) -> dict[str, str]:
    """Every file and directory below one, with a digest of what it holds."""
    return {
        path.relative_to(directory).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
        if path.exists()
    }


def prepare(bad: Bad, base: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the mistake in a copy of the good directory, which becomes the working directory."""
    shutil.copytree(base, directory, dirs_exist_ok=True)
    monkeypatch.chdir(directory)
    for name, value in bad.env.items():
        monkeypatch.setenv(name, value)
    for name, content in bad.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    if bad.make is not None:
        bad.make()


def run_row(
    bad: Bad, base: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, list[str]]:
    """Make the mistake and run the command: its status, what it says on stderr, and the paths it has changed."""
    prepare(bad, base, directory, monkeypatch)
    before = contents(directory)
    capfd.readouterr()
    with own_logging():
        result = CliRunner().invoke(app, shlex.split(bad.command))
    after = contents(directory)
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    return result.exit_code, capfd.readouterr().err + result.output, changed


def refuses(
    bad: Bad, base: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Assert that the command says one error, the expected one, and that what it leaves is in nobody's way: once the
    mistake is mended, the same command succeeds."""
    code, said, changed = run_row(bad, base, directory, monkeypatch, capfd)
    assert code == 1, said
    assert "Traceback" not in said, said
    errors = re.split(r"(?m)^error(?: on rank \d+)?: ", said)
    assert len(errors) == 2, said
    assert re.match(bad.message, " ".join(errors[1].split())), errors[1]
    if not changed or not bad.mended:
        return
    for path in set(contents(directory)) - set(contents(base)) - set(changed):
        if (directory / path).is_file():
            (directory / path).unlink()
    shutil.copytree(base, directory, dirs_exist_ok=True)
    for name in bad.env:
        monkeypatch.delenv(name)
    with own_logging():
        again = CliRunner().invoke(app, shlex.split(bad.command))
    assert again.exit_code == 0, capfd.readouterr().err + again.output
