"""Imports point downward only: each folder may import itself and the folders listed for it, nothing above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "real_megatron"

# Folders (and single modules) of the package: what each imports beside itself, exactly. docs/architecture.md says the
# same (tests/test_docs.py).
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "terminal": set(),
    "processes": set(),
    "progress": set(),
    "announced": {"errors"},
    "runtime": {"announced", "errors"},
    "files": set(),
    "locks": {"files", "errors"},
    "registry": {"errors"},
    "hardware": {"errors"},
    "sections": {"errors"},
    "config": {"sections"},
    "agreement": {"config", "sections", "runtime", "errors"},
    "scores": {"config", "errors"},
    "head": set(),
    "objective": {"scores", "config", "registry", "errors"},
    "batch": {"scores"},
    "hf": {"locks", "files", "errors"},
    "bridge": {"hf", "processes", "registry", "terminal", "errors"},
    "policy": {"bridge", "hf", "head", "objective", "batch", "scores", "config", "processes", "runtime"}
    | {"progress", "hardware", "errors"},
    "planning": {"policy", "bridge", "batch", "hf", "config", "hardware", "errors"},
    "rollout": {"head", "batch", "hf", "scores", "config", "registry", "runtime"} | {"progress", "errors"},
    "data": {"batch", "scores", "config", "registry", "errors"},
    "evaluation": {"scores", "files", "errors"},
    "judging": {"evaluation", "data", "rollout", "hf", "batch", "scores", "agreement", "config", "sections", "runtime"}
    | {"locks", "files", "errors"},
    "training": {"planning", "judging", "evaluation", "data", "rollout", "policy", "bridge", "hf", "objective", "batch"}
    | {
        "scores",
        "agreement",
        "config",
        "sections",
        "runtime",
        "progress",
        "terminal",
        "locks",
        "hardware",
        "files",
        "errors",
    },
    "doctor": {"rollout", "policy", "head", "config", "runtime", "hardware", "errors", "version"},
    "cluster": {"doctor", "planning", "rollout", "config", "runtime", "hardware", "errors", "version"},
    # Names of the library, imported on first use.
    "__init__": {"training", "judging", "evaluation", "data", "rollout", "policy", "bridge", "objective"}
    | {"config", "errors", "version"},
    "cli": {
        "announced",
        "cluster",
        "doctor",
        "training",
        "planning",
        "judging",
        "evaluation",
        "policy",
        "bridge",
        "hf",
        "config",
    }
    | {"runtime", "terminal", "locks", "hardware", "errors", "version"},
    "__main__": {"cli"},
}
# Third-party packages that a folder must never touch.
FORBIDDEN = {
    "version": {"megatron", "torch", "transformers"},
    "errors": {"megatron", "torch", "transformers"},
    "files": {"megatron", "torch", "transformers"},
    "locks": {"megatron", "torch", "transformers"},
    "registry": {"megatron", "torch", "transformers"},
    "hardware": {"megatron", "torch", "transformers"},
    "sections": {"megatron", "torch", "transformers"},
    "config": {"megatron", "torch", "transformers"},
    "terminal": {"megatron", "torch", "transformers"},
    "processes": {"megatron", "torch", "transformers"},
    "runtime": {"megatron", "transformers"},
    "scores": {"megatron", "torch", "datasets", "aiohttp"},
    "objective": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "head": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "batch": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "hf": {"megatron", "datasets", "aiohttp"},
    "rollout": {"megatron"},
    "data": {"megatron"},
    "evaluation": {"megatron", "torch", "transformers"},
    "judging": {"megatron"},
}


def imports(path: Path) -> list[str]:
    """Dotted names of every module the file imports, at the top or inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(path: Path) -> str:
    """The folder, or single module, of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def used_by(part: str) -> set[str]:
    """What the files of a part import from other parts of the package."""
    names = [name for path in ROOT.rglob("*.py") if part_of(path) == part for name in imports(path)]
    return {name.split(".")[1] for name in names if name.startswith("real_megatron.")} - {part}


def faults(path: Path, part: str) -> list[str]:
    """What is wrong with a file's imports."""
    found = []
    if part not in ALLOWED:
        found.append(f"unknown module {part}: say in this test what it may import")
    for name in imports(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top in FORBIDDEN.get(part, set()):
            found.append(f"{part} must not import {top} ({name})")
        if top == "real_megatron" and target != part and target not in ALLOWED.get(part, set()):
            found.append(f"{part} must not import {name}")
        if top == "real_megatron" and not (ROOT / target).is_dir() and not (ROOT / f"{target}.py").is_file():
            found.append(f"{name}: there is no such module")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    assert not faults(path, part_of(path))


def test_the_table_names_what_is_there() -> None:
    assert {part_of(path) for path in ROOT.rglob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_no_permission_is_unused(part: str) -> None:
    assert ALLOWED[part] <= used_by(part)


def test_the_table_points_downward() -> None:
    parts = list(ALLOWED)
    for part, targets in ALLOWED.items():
        assert all(parts.index(target) < parts.index(part) for target in targets), part


@pytest.mark.parametrize(
    ("part", "line", "fault"),
    [
        ("newcomer", "import json", "unknown module newcomer"),
        ("batch", "from real_megatron.policy.policy import Policy", "batch must not import real_megatron.policy"),
        ("judging", "from real_megatron.training import rl", "judging must not import real_megatron.training"),
        ("rollout", "def f():\n    import megatron.core", "rollout must not import megatron"),
        ("training", "from real_megatron.schedules import plan", "there is no such module"),
        ("training", "from real_megatron.cli import main", "training must not import real_megatron.cli"),
    ],
)
def test_a_fault_is_found(part: str, line: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert any(fault in found for found in faults(path, part))
