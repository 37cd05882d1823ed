"""Every configuration of the examples is valid, and every script parses."""

import shutil
import subprocess
from pathlib import Path

import pytest

from real_megatron.config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(set(ROOT.glob("examples/**/*.yaml")) - {ROOT / "examples/launch/kubernetes.yaml"})
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch")])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_configuration_is_valid(path: Path) -> None:
    assert RunConfig.from_yaml(path, []).model.path


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_parses(path: Path) -> None:
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_of_launches_are_clean() -> None:
    scripts = sorted((ROOT / "examples/launch").glob("*.s*"))
    assert len(scripts) == 3
    subprocess.run(["shellcheck", *scripts], check=True)
