"""Would the tests notice? Applies deliberate changes to copies of the code and runs the tests that should turn red.

    python -m tests.mutate                      # all changes: about half an hour on two cores
    python -m tests.mutate training rollout     # those of two tables
    python -m tests.mutate training:3 policy    # the third of a table, and all of another

A table is a file `tests/mutations/NAME.toml` (README.md there says how to write one). Every change is made in a copy of
the working tree, never in the tree itself. Exits with 1 where less than 95 % of the changes are noticed, with 2 where
the table does not fit the code: a text that is not found once, a test that fails without the change.
"""

import argparse
import ast
import compileall
import datetime
import gc
import multiprocessing
import os
import py_compile
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
PACKAGE = "real_megatron"
REQUIRED = 0.95
"""Least share of the changes that tests have to notice."""
TIMEOUT_S = 900
"""After so long a change counts as noticed: the tests hang."""

Outcome = Literal["killed", "survived", "equivalent", "needs", "broken"]

_SERVER = multiprocessing.get_context("forkserver")
"""Each run of pytest is forked from a process that has imported `_LARGE`, which takes longest, once for all changes."""
_LARGE = (
    *("pytest", "hypothesis", "torch", "scipy.stats", "datasets", "aiohttp", "pydantic", "matplotlib.pyplot"),
    *("transformers.generation", "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3"),
    *("megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.dist_checkpointing"),
)


@dataclass(frozen=True)
class Change:
    """One deliberate change of one file."""

    table: str
    number: int
    """In its table, from 1."""
    file: str
    """Below the package."""
    old: str
    """Stands in the file exactly once."""
    new: str
    tests: tuple[str, ...] = ()
    """pytest's ids below tests/ of those that should turn red."""
    equivalent: str = ""
    """Why no test can notice it; it is not run then."""
    needs: str = ""
    """What its tests need that this machine may lack (gpu, sglang); it is not run then."""

    @property
    def name(self) -> str:
        return f"{self.table}:{self.number}"

    @property
    def path(self) -> Path:
        return Path(PACKAGE, self.file)


def load_table(path: Path) -> list[Change]:
    """The changes of one table. Raises TypeError for a key that no change has."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["change"]
    return [
        Change(path.stem, number, **{**entry, "tests": tuple(entry.get("tests", ()))})
        for number, entry in enumerate(entries, 1)
    ]


def load_tables(root: Path = ROOT) -> list[Change]:
    """The changes of all tables."""
    return [change for path in sorted((root / "tests/mutations").glob("*.toml")) for change in load_table(path)]


def faults(change: Change, root: Path = ROOT) -> list[str]:
    """What of a change does not fit the code: it would show nothing."""
    path = root / change.path
    if not path.is_file():
        return [f"{change.name}: {change.path} is not there"]
    text = path.read_text(encoding="utf-8")
    found = []
    if text.count(change.old) != 1:
        found.append(f"{change.name}: {change.path} has {change.old!r} {text.count(change.old)} times, not once")
    elif change.old == change.new:
        found.append(f"{change.name}: old and new are the same")
    elif path.suffix == ".py":
        try:
            ast.parse(text.replace(change.old, change.new))
        except SyntaxError as error:
            found.append(f"{change.name}: {change.path} is no Python after the change: {error}")
    if bool(change.tests) == bool(change.equivalent):
        found.append(f"{change.name}: give it the tests that should turn red, or say why it is equivalent")
    for test in change.tests:
        file, _, function = test.partition("::")
        if not (root / "tests" / file).is_file():
            found.append(f"{change.name}: tests/{file} is not there")
        elif function and function.partition("[")[0] not in _functions(root / "tests" / file):
            found.append(f"{change.name}: tests/{file} has no {function}")
    return found


@cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def chosen(changes: Sequence[Change], names: Sequence[str]) -> list[Change]:
    """Those of the named tables, or `TABLE:NUMBER`; all without a name. Raises ValueError for a name of none."""
    known = {change.table for change in changes} | {change.name for change in changes}
    if unknown := [name for name in names if name not in known]:
        tables = dict.fromkeys(change.table for change in changes)
        raise ValueError(f"no table or change {', '.join(unknown)}; tables: {', '.join(tables)}")
    return [change for change in changes if not names or change.table in names or change.name in names]


def copy_tree(root: Path, directory: Path) -> Path:
    """A copy of the files that git knows or would add, with the environment and the shared data linked beside it."""
    tree = directory / "tree"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = root / name, tree / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    for source, target in ((root / ".venv", tree / ".venv"), (root.parent / "shared", directory / "shared")):
        if source.exists() and not target.is_symlink():
            target.symlink_to(source.resolve())
    # Python takes a compiled file for current by the source's size and second, and a change may leave both: by its
    # content instead.
    compileall.compile_dir(tree / PACKAGE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return tree


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """pytest's exit status in a copy, None where it took too long, and what it printed."""
    output = tree.parent / "output"
    process = _SERVER.Process(target=_pytest, args=(tree, [f"tests/{test}" for test in tests], output))
    process.start()
    process.join(TIMEOUT_S)
    status = process.exitcode
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)  # with the ranks and servers that a failed test has left
    except ProcessLookupError:
        pass
    process.join()
    return status, output.read_text(encoding="utf-8", errors="replace")


def _pytest(tree: Path, tests: Sequence[str], output: Path) -> None:
    """Run the tests of a copy, in a process of their own that has imported large packages but nothing of this one."""
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "tests")]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")  # else the ranks of a test import this file
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import pytest

    gc.freeze()  # pytest collects garbage several times, and the large packages are none
    plugins = (option for name in ("cacheprovider", "xdist", "anyio") for option in ("-p", f"no:{name}"))
    status = pytest.main(["-x", "-q", "--assert=plain", *plugins, *tests])
    sys.stdout.flush()
    os._exit(int(status))  # without waiting for ranks, as multiprocessing would


@contextmanager
def applied(change: Change, tree: Path) -> Iterator[None]:
    """The change is in the copy inside of the block."""
    path = tree / change.path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(change.old, change.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def attempt(change: Change, tree: Path) -> Outcome:
    """What the tests say of a change. `broken`: they could not be run with it, which shows nothing."""
    if change.equivalent:
        return "equivalent"
    if change.needs:
        return "needs"
    with applied(change, tree):
        status, output = run_tests(tree, change.tests)
    if status in (1, None):
        return "killed"
    if status == 0:
        return "survived"
    print(output)
    return "broken"


def attempt_all(changes: Sequence[Change], trees: Sequence[Path]) -> list[Outcome]:
    """Every change, in as many copies at a time as there are."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(change: Change) -> Outcome:
        tree = free.get()
        try:
            outcome = attempt(change, tree)
        finally:
            free.put(tree)
        print(f"{outcome:10} {change.name:14} {_shown(change)}", flush=True)
        return outcome

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(one, changes))


def report(changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[str, float]:
    """A table in Markdown, table by table, with what survived; and the share of the changes run that were noticed."""
    lines = ["| Table | Changes | Noticed | Not noticed | Equivalent | Not run | Share |", "|---" * 7 + "|"]
    share = 1.0
    for table in [*dict.fromkeys(change.table for change in changes), "all"]:
        of = [outcome for c, outcome in zip(changes, outcomes, strict=True) if table in (c.table, "all")]
        killed, survived, equivalent = (of.count(kind) for kind in ("killed", "survived", "equivalent"))
        share = killed / (killed + survived) if killed + survived else 1.0
        numbers = (len(of), killed, survived, equivalent, of.count("needs"))
        lines.append(f"| {table} | {' | '.join(map(str, numbers))} | {100 * share:.1f} % |")
    survivors = [c for c, outcome in zip(changes, outcomes, strict=True) if outcome == "survived"]
    lines += ["", "Not noticed:" if survivors else "Every change that was run was noticed.", ""]
    lines += [f"- {change.name}, {_shown(change)}" for change in survivors]
    return "\n".join(lines).rstrip() + "\n", share


def _shown(change: Change) -> str:
    old, new = (" ".join(text.split()) for text in (change.old, change.new))
    return f"{change.file}: `{old}` → `{new or '(removed)'}`"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tables, or changes as TABLE:NUMBER; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at a time")
    parser.add_argument("--record", type=Path, help="write what was found to this file as well")
    args = parser.parse_args(arguments)
    try:
        changes = chosen(load_tables(root), args.names)
    except ValueError as error:
        parser.error(str(error))
    if stale := [fault for change in changes for fault in faults(change, root)]:
        print("\n".join(stale))
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    if root == ROOT:
        _SERVER.set_forkserver_preload(list(_LARGE))
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        trees = []
        for job in range(args.jobs):
            Path(scratch, str(job)).mkdir()
            trees.append(copy_tree(root, Path(scratch, str(job))))
        tests = sorted({test for change in changes if not change.needs for test in change.tests})
        status, output = run_tests(trees[0], tests) if tests else (0, "")
        if status != 0:
            print(output, "The tests fail without any change, or cannot be found.", sep="\n")
            return 2
        outcomes = attempt_all(changes, trees)
    text, share = report(changes, outcomes)
    print("\n" + text)
    if args.record:
        args.record.write_text(_heading(root) + text, encoding="utf-8")
    if "broken" in outcomes:
        return 2
    return 0 if share >= REQUIRED else 1


def _heading(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date()
    title = "# Deliberate changes, and whether the tests notice"
    return f"{title}\n\n`python -m tests.mutate`, commit {commit}, {today}.\n\n"


if __name__ == "__main__":
    sys.exit(main())
