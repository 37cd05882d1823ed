"""The Dockerfile, which no test can build: paths exist, shell parses, versions are those of requirements/."""

import fnmatch
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from real_megatron.cli import app
from tests.test_requirements import pins

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Name and text of each instruction, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = [line.partition(" ") for line in lines.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def of(kind: str) -> list[str]:
    return [text for name, text in instructions() if name == kind]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sources = [source for text in of("COPY") for source in text.split()[:-1]]
    assert len(sources) >= 7
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source
    assert {".git", ".venv*"} <= set(ignored)


def test_requirements_are_copied_before_they_are_used() -> None:
    there: set[str] = set()
    used = 0
    for name, text in instructions():
        files = set(re.findall(r"requirements/\w+\.txt", text))
        if name == "COPY":
            there |= files
        elif name == "RUN":
            assert files <= there, text
            used += len(files)
    assert used >= 3
    # Every version but the base image's is that of requirements/.
    assert not re.search(r"==\s*\d", " ".join(of("RUN")))


def test_the_base_image_has_the_cuda_of_torch() -> None:
    (image,) = of("FROM")
    found = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-cudnn-devel-ubuntu24\.04", image)
    assert found and pins("sglang")["cuda-toolkit"].startswith(f"{found[1]}.")


@pytest.mark.parametrize("text", of("RUN"))
def test_shell_parses(text: str) -> None:
    subprocess.run(["bash", "-n", "-c", text], check=True)
    if shutil.which("shellcheck"):
        # SC2086: the command in a variable is meant to be split.
        done = subprocess.run(
            ["shellcheck", "--shell=sh", "--exclude=SC2086", "-"], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_it_runs_a_command_as_another_user_than_root() -> None:
    assert of("USER")[-1] not in ("root", "0")
    last = [name for name, _ in instructions() if name in ("USER", "RUN")][-1]
    assert last == "USER", "nothing is run as root after it"
    program, command, *options = json.loads(of("CMD")[-1])
    assert program == "real-megatron" and command in {one.callback.__name__ for one in app.registered_commands}
    assert options == ["--python", "/opt/sglang/bin/python"]
