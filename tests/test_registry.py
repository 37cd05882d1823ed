"""Objects by name: built in, registered by a module of the user's, or its attributes; never another's of that name."""

import sys
from pathlib import Path

import pytest

from real_megatron.errors import ConfigError
from real_megatron.registry import Registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """One with `plain` built in, and modules of a user's on the path, which reach it as `probe.registry`."""
    registry: Registry[str] = Registry("sort", "some.key")
    registry.register("plain", "built in", "real_megatron.somewhere")
    (tmp_path / "probe.py").write_text("registry = None\n")
    (tmp_path / "user_one.py").write_text(
        "import probe\nprobe.registry.register('own', 'one', __name__)\nattribute = 'an attribute'\n"
    )
    (tmp_path / "user_two.py").write_text("import probe\nprobe.registry.register('own', 'two', __name__)\n")
    (tmp_path / "user_three.py").write_text("import no_such_module\n")
    (tmp_path / "user_five.py").write_text("\nhalf = 1 / 0\n")
    (tmp_path / "user_six.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import probe  # type: ignore[import-not-found]

    probe.registry = registry
    yield registry
    for name in ("probe", "user_one", "user_two", "user_three", "user_four", "user_five", "user_six"):
        sys.modules.pop(name, None)


def test_names_and_modules(registry: Registry[str]) -> None:
    assert registry.find("plain") == "built in"
    assert registry.find("user_one:own") == "one" == registry.find("own") == registry.find("user_one:own")
    assert registry.find("user_one:attribute") == "an attribute"
    assert list(registry) == ["own", "plain"]


def test_a_module_keeps_its_names_when_another_imports_it_first(registry: Registry[str], tmp_path: Path) -> None:
    """As an engine of a user's that builds on a registered one."""
    (tmp_path / "user_four.py").write_text(
        "import probe, user_one\nprobe.registry.register('more', 'four', __name__)\n"
    )
    assert registry.find("user_four:more") == "four" and registry.find("user_one:own") == "one"
    with pytest.raises(ConfigError, match="user_four neither registers nor defines 'own'"):
        registry.find("user_four:own")


def test_built_ins_are_imported_when_they_are_asked_for(registry: Registry[str]) -> None:
    import probe

    probe.registry = lazy = Registry[str]("sort", "some.key", built_in={"own": "user_one"})
    assert list(lazy) == ["own"] and "user_one" not in sys.modules
    with pytest.raises(ConfigError, match="sort 'own' of elsewhere: user_one has registered this name"):
        lazy.register("own", "another", "elsewhere")
    with pytest.raises(ConfigError, match="unknown sort 'nope'; known: own, or module:name"):
        lazy.find("nope")
    assert "user_one" not in sys.modules
    assert lazy.find("own") == lazy["own"] == lazy.find("user_one:own") == "one" and list(lazy) == ["own"]


def test_a_modules_name_is_never_anothers(registry: Registry[str]) -> None:
    with pytest.raises(ConfigError, match="module user_one neither registers nor defines 'plain'"):
        registry.find("user_one:plain")
    registry.find("user_one:own")
    with pytest.raises(ConfigError, match="sort 'own' of user_two: user_one has registered this name; choose another"):
        registry.find("user_two:own")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", r"some\.key: unknown sort 'nope'; known: plain, or module:name"),
        ("no_such:x", "'no_such:x': module no_such cannot be imported"),
        ("user_five:x", "fails when it is imported .ZeroDivisionError: division by zero, .*user_five.py line 2.; mend"),
        ("user_six:x", "module user_six fails when it is imported .SyntaxError: "),
        ("..up:x", "module ..up fails when it is imported"),
        ("user_three:x", "module user_three cannot be imported .*no_such_module"),
        ("user_one:nope", "module user_one neither registers nor defines 'nope'"),
    ],
)
def test_what_is_not_there_is_named(registry: Registry[str], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.find(name)
