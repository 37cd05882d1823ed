"""The table of deliberate changes fits the code, and the program tells what is noticed from what is not."""

import subprocess
from pathlib import Path

import pytest

from tests.mutate import Change, chosen, faults, load_tables, main, report


def test_every_change_of_the_table_can_be_made() -> None:
    """A text that has moved on, or a test that has another name, shows nothing: correct the entry with the code."""
    changes = load_tables()
    assert not [fault for change in changes for fault in faults(change)]
    assert len({(change.file, change.old, change.new) for change in changes}) == len(changes)
    folders = {path.name for path in Path(__file__).parents[1].joinpath("real_megatron").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= {change.file.partition("/")[0] for change in changes}


CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = "from real_megatron.code import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
TABLE = """
[[change]]
file = "code.py"
old = "return 2 * x"
new = "return 3 * x"
tests = ["test_code.py::test_double"]

[[change]]
file = "code.py"
old = "return x / 2"
new = "return x / 3"
tests = ["test_code.py"]

[[change]]
file = "code.py"
old = "def half(x):"
new = "def half(y):"
equivalent = "nobody names the argument"

[[change]]
file = "code.py"
old = "x / 2"
new = "x // 2"
tests = ["test_code.py"]
needs = "gpu"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package of one file, with one test and four changes."""
    files = {
        "real_megatron/__init__.py": "",
        "real_megatron/code.py": CODE,
        "tests/test_code.py": TESTS,
        "tests/mutations/few.toml": TABLE,
    }
    for name, text in files.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    return tmp_path / "repository"


def test_a_change_is_noticed_where_its_test_fails(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By real runs of pytest, in a copy: the tree itself stays as it is."""
    assert main([], repository) == 1
    printed = capsys.readouterr().out
    assert "killed     few:1" in printed and "survived   few:2" in printed
    assert "| few | 4 | 1 | 1 | 1 | 1 | 50.0 % |" in printed
    assert printed.rstrip().endswith("Not noticed:\n\n- few:2, code.py: `return x / 2` → `return x / 3`")
    assert (repository / "real_megatron/code.py").read_text() == CODE


def test_tests_that_fail_anyway_show_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "tests/test_code.py").write_text(TESTS.replace("== 6", "== 7"))
    assert main(["few:1"], repository) == 2
    assert "The tests fail without any change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"old": "x"}, "has 'x' 4 times, not once"),
        ({"old": "gone"}, "has 'gone' 0 times, not once"),
        ({"new": "return 2 * x"}, "old and new are the same"),
        ({"new": "return 2 *"}, "is no Python after the change"),
        ({"file": "no.py"}, "real_megatron/no.py is not there"),
        ({"tests": ("test_no.py",)}, "tests/test_no.py is not there"),
        ({"tests": ("test_code.py::test_no[3]",)}, "tests/test_code.py has no test_no"),
        ({"tests": ()}, "give it the tests that should turn red, or say why it is equivalent"),
    ],
)
def test_an_entry_that_does_not_fit_the_code_is_named(entry: dict, message: str, repository: Path) -> None:
    fields = {"file": "code.py", "old": "return 2 * x", "new": "return 3 * x", "tests": ("test_code.py::test_double",)}
    assert not faults(Change("few", 1, **fields), repository)
    (fault,) = faults(Change("few", 1, **{**fields, **entry}), repository)
    assert fault.startswith("few:1: ") and message in fault


def test_tables_and_single_changes_are_chosen_by_name() -> None:
    changes = [Change(table, number, "f", "a", "b") for table in ("x", "y") for number in (1, 2)]
    assert chosen(changes, []) == changes
    assert [change.name for change in chosen(changes, ["y:2", "x"])] == ["x:1", "x:2", "y:2"]
    with pytest.raises(ValueError, match="no table or change z, x:3; tables: x, y"):
        chosen(changes, ["z", "x:3"])


def test_the_share_is_of_the_changes_that_were_run() -> None:
    changes = [Change(table, number, "f", "a", "b") for table in ("x", "y") for number in (1, 2, 3)]
    text, share = report(changes, ["killed", "killed", "equivalent", "killed", "survived", "needs"])
    assert share == 3 / 4
    assert "| x | 3 | 2 | 0 | 1 | 0 | 100.0 % |" in text and "| y | 3 | 1 | 1 | 0 | 1 | 50.0 % |" in text
    assert "| all | 6 | 3 | 1 | 1 | 1 | 75.0 % |" in text and text.endswith("- y:2, f: `a` → `b`\n")
