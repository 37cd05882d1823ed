"""Which versions this package accepts: of pyproject.toml in a checkout, else of the installed metadata."""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
NAME = "real-megatron"
MODULES = {
    "megatron-core": "megatron.core",
    "PyYAML": "yaml",
    "transformer-engine": "transformer_engine.pytorch",
}
"""Modules that are not called as their distribution is."""


def module_of(distribution: str) -> str:
    """The module that a distribution's import begins with."""
    return MODULES.get(distribution, distribution.replace("-", "_"))


def _declared() -> tuple[str, list[str]]:
    """Range of Python, and requirements, those of extras with their marker."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if table["name"] == NAME:
            extras = table["optional-dependencies"]
            optional = [f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines]
            return table["requires-python"], [*table["dependencies"], *optional]
    try:
        installed = metadata(NAME)
    except PackageNotFoundError:
        return "", []
    return installed["Requires-Python"] or "", installed.get_all("Requires-Dist") or []


def python_range() -> str:
    """The versions of Python that are accepted."""
    return _declared()[0]


def required() -> dict[str, str]:
    """What has to be installed: distribution → range, such as `>=2.10,<2.15`."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, _declared()[1])
    return {one.name: str(one.specifier) for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})}


def extra(name: str) -> str:
    """What an optional feature asks for, as for pip: `te` → `transformer-engine[pytorch]>=2.0`."""
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in _declared()[1]]
    chosen = [one for one in lines if one.marker and f'extra == "{name}"' in str(one.marker)]
    for one in chosen:
        one.marker = None
    return " ".join(f'"{one}"' for one in chosen)


def install_transformer_engine() -> str:
    """The command: in a checkout of the version that fits Megatron-Core's, else of any that is accepted."""
    pinned = ROOT / "requirements" / "gpu.txt"
    what = f"-r {pinned}" if pinned.is_file() else extra("te")
    return f"pip install --no-build-isolation {what}"


def fits(version: str, accepted: str) -> Literal["yes", "old", "new"]:
    """Whether a version lies in a range, below it or above it."""
    from packaging.specifiers import SpecifierSet

    everything = SpecifierSet(accepted)
    if everything.contains(version, prereleases=True):
        return "yes"
    lower = SpecifierSet(",".join(str(one) for one in everything if one.operator in (">=", ">")))
    return "new" if lower.contains(version, prereleases=True) else "old"
