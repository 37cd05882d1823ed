"""requirements/: one version of what several environments must agree on, and no script that names what is not there."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from real_megatron.doctor import requirements

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    """Package → version of requirements/NAME.txt and of the files that it takes in."""
    found: dict[str, str] = {}
    for line in (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").removesuffix(".txt"))
        elif line and not line.startswith("#"):
            one = Requirement(line)
            (version,) = [specifier.version for specifier in one.specifier if specifier.operator == "=="]
            found[one.name.lower().replace("_", "-")] = version
    return found


def test_both_ends_of_the_weight_sync_have_one_nccl() -> None:
    trainer, server = pins("gpu"), pins("sglang")
    for package in ("torch", "nvidia-nccl-cu13"):
        assert trainer[package] == server[package]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_trainer_accepts_what_is_pinned(name: str) -> None:
    pinned = pins(name)
    for package, accepted in requirements.required().items():
        assert requirements.fits(pinned[package.lower().replace("_", "-")], accepted) == "yes", package


@pytest.mark.parametrize("server", ["sglang", "vllm"])
def test_installers_find_every_pin(server: str) -> None:
    script = (ROOT / f"tools/install_{server}_cpu.sh").read_text(encoding="utf-8")
    asked = re.findall(r"pinned ([a-z0-9 \\\n-]+?)[)|]", script)
    names = " ".join(asked).replace("\\", " ").split()
    assert len(names) >= 3 and set(names) <= set(pins(server))
    assert pins(server)[server] in script, "the stamp and the text name the version"


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
