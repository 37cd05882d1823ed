"""Imports point downward only: each room may import itself and the rooms listed for it, nothing above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "real_megatron"

# Rooms of the package that each room may import.
ALLOWED = {
    "__init__": set(),
    "sections": set(),
    "config": {"sections"},
    "scores": set(),
    "head": set(),
    "objective": {"config", "sections"},
    "batch": set(),
    "bridge": {"sections"},
    "policy": {"config", "sections", "scores", "objective", "head", "batch", "bridge"},
    "rollout": {"config", "sections", "scores", "batch"},
    "data": {"config", "sections", "scores", "batch"},
    "evaluation": {"config", "sections", "scores", "batch", "data", "rollout"},
    "planning": {"config", "sections", "bridge"},
    "__main__": {"cli"},
}
EVERYTHING = {"training", "cli"}
# Third-party packages that a room must never touch.
FORBIDDEN = {
    "scores": {"megatron", "torch", "datasets", "aiohttp"},
    "objective": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "head": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "batch": {"megatron", "transformers", "datasets", "aiohttp", "yaml"},
    "rollout": {"megatron"},
    "data": {"megatron"},
    "evaluation": {"megatron"},
    "config": {"megatron", "torch", "transformers"},
    "sections": {"megatron", "torch", "transformers"},
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


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in FORBIDDEN.get(room, set()), f"{room} must not import {top} ({name})"
        if top == "real_megatron" and room not in EVERYTHING:
            target = rest.split(".")[0]
            assert room in ALLOWED, f"new room {room}: say in this test what it may import"
            assert target == room or target in ALLOWED[room], f"{room} must not import {name}"
        if top == "real_megatron":
            if rest.split(".")[0] == "cli":
                assert room in ("cli", "__main__"), f"nothing imports the command line ({name})"


def test_the_table_knows_every_room() -> None:
    rooms = {room_of(path) for path in ROOT.rglob("*.py")}
    assert rooms <= set(ALLOWED) | EVERYTHING
