"""Strict YAML and overrides: every fault is one clear line that names its place."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from real_megatron.errors import ConfigError
from real_megatron.sections import Section, describe_keys, known_keys


class Leaf(Section):
    """A leaf."""

    lr: float = Field(0.1, gt=0, description="Rate.")
    clamp: float | None = Field(None, description="Clamp.")
    texts: list[str] = Field(["a"], description="Texts.")


class Item(Section):
    """An item."""

    path: str = Field(..., description="Path.")
    limit: int | None = Field(None, ge=1, description="Limit.")


class Root(Section):
    """The root."""

    steps: int = Field(1, description="Steps.")
    optimizer: Leaf = Field(default_factory=Leaf, description="Leaf.")
    items: list[Item] = Field(default_factory=list, description="Items.")
    named: dict[str, Item] = Field(default_factory=dict, description="Named.")


def fault(text: str, tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Root.from_yaml(path, overrides)
    return str(error.value).replace(str(path), "run.yaml")


def test_values_are_typed_by_yaml_and_by_the_field(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\noptimizer: {lr: 1e-6, texts: [1, 2]}\nitems:\n  - path: x\n")
    config = Root.from_yaml(path, ["optimizer.clamp=2", "items.0.limit=5", "items.1.path=y", "named.dev.path=z"])
    # YAML 1.1 reads 1e-6 as text and 1 as a number; the field's type decides.
    assert config.optimizer.lr == 1e-6 and config.optimizer.texts == ["1", "2"] and config.optimizer.clamp == 2.0
    assert config.items == [Item(path="x", limit=5), Item(path="y")] and config.named == {"dev": Item(path="z")}
    assert Root.from_yaml(None, ["optimizer.clamp=null"]).optimizer.clamp is None


def test_the_last_override_of_a_key_wins() -> None:
    assert Root.from_yaml(None, ["steps=2", "steps=7"]).steps == 7


def test_saved_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = Root.from_yaml(None, ["items.0.path=x", "optimizer.texts=[é]", "optimizer.lr=3e-7"])
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert Root.from_yaml(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("step: 3", (), "run.yaml:1: unknown key `step`; did you mean `steps`?"),
        ("steps: 1\nlr: 2", (), "run.yaml:2: unknown key `lr`; did you mean `optimizer.lr`?"),
        (
            "optimizer:\n  zz: 2",
            (),
            "run.yaml:2: unknown key `optimizer.zz`; known keys here: lr, clamp, texts",
        ),
        (
            "",
            ("optimizer.lrr=2",),
            "override `optimizer.lrr=2`: unknown key `optimizer.lrr`; did you mean `optimizer.lr`?",
        ),
        (
            "items:\n  - path: x\n    limits: 2",
            (),
            "run.yaml:3: unknown key `items.0.limits`; did you mean `items.0.limit`?",
        ),
        (
            "named:\n  dev: {path: x, limits: 2}",
            (),
            "run.yaml:2: unknown key `named.dev.limits`; did you mean `named.dev.limit`?",
        ),
        ("items:\n  - limit: 2", (), "run.yaml:2: `items.0.path` is required and not set"),
        ("optimizer:\n  lr: -1", (), "run.yaml:2: `optimizer.lr`: Input should be greater than 0 (got -1)"),
        (
            "optimizer: {lr: 1}",
            ("optimizer.lr=x",),
            "override `optimizer.lr=x`: `optimizer.lr`: Input should be a valid number, unable to parse string as a "
            "number (got 'x')",
        ),
        ("steps: 1\nsteps: 2", (), "run.yaml:2: `steps` is set twice (first on line 1); keep one"),
        (
            "optimizer:\n  lr: 1\n  clamp: 2\n  lr: 3",
            (),
            "run.yaml:4: `optimizer.lr` is set twice (first on line 2); keep one",
        ),
        (
            "items:\n  - path: x\n    limit: 1\n    path: y",
            (),
            "run.yaml:4: `items.0.path` is set twice (first on line 2); keep one",
        ),
        ("", ("steps",), "override `steps`: write it as key=value, for example optimizer.lr=1e-6"),
        ("steps: {y: 1}", ("steps.y.z=1",), "override `steps.y.z=1`: `steps.y` is a value, it has no keys"),
        (
            "items: [{path: x}]",
            ("items.5.path=y",),
            "override `items.5.path=y`: `items` is a list of 1 items in the file; `5` must be a number from 0 to 1",
        ),
        (
            "",
            ("items.-1.path=y",),
            "override `items.-1.path=y`: `items`: must be a list, as in [a, b] (got {'-1': {'path': 'y'}})",
        ),
        ("optimizer: {lr: .inf}", (), "run.yaml:1: `optimizer.lr`: Input should be a finite number (got inf)"),
        (
            "optimizer:\n  texts: [a, yes]",
            (),
            'run.yaml:2: `optimizer.texts.1`: YAML reads it as True, not as text; put it in quotes, as in "yes"',
        ),
        (
            "named:\n  no: {path: x}",
            (),
            'run.yaml:1: `named`: YAML reads a key as False, not as text; put it in quotes, as in "yes"',
        ),
        (
            "",
            ("named={2024-01-01: {path: x}}",),
            "override `named={2024-01-01: {path: x}}`: `named`: YAML reads a key as 2024-01-01, not as text; put it in "
            'quotes, as in "yes"',
        ),
        ("items: &x [*x]", (), "run.yaml: nested too deeply, or an alias that holds itself"),
        ("- 1", (), "run.yaml: the file must hold `key: value` lines, not a list"),
    ],
)
def test_each_fault_names_its_place_and_the_fix(
    text: str, overrides: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    assert fault(text, tmp_path, *overrides) == expected


def test_what_is_assigned_is_checked_too() -> None:
    config = Root()
    for section, name, value in ((config, "steps", "many"), (config.optimizer, "lr", 0), (config, "step", 3)):
        with pytest.raises(ValidationError):
            setattr(section, name, value)
    config.optimizer.lr = "1e-6"
    assert config.optimizer.lr == 1e-6


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    lines = fault("step: 3\noptimizer: {lr: 0}", tmp_path, "named.a.limit=1").splitlines()
    assert len(lines) == 3


def test_unreadable_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot read the configuration"):
        Root.from_yaml(tmp_path / "absent.yaml")
    assert "run.yaml:1: not valid YAML" in fault("a: [1", tmp_path)


def test_keys_and_their_description() -> None:
    assert known_keys(Root)[:3] == ["steps", "optimizer", "optimizer.lr"]
    text = describe_keys(Root)
    assert "| `lr` | number, > 0 | `0.1` | Rate. |" in text and "## `named.NAME`" in text and "## `items[i]`" in text
