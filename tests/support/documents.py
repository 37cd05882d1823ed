"""What documents, docstrings, comments and messages refer to: paths, configuration keys, commands. Finds what is dead.

Each check takes a `Text` and returns the faults as `file:line: what`, so that it can be tried on a made-up text.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

from real_megatron.config import RunConfig
from real_megatron.sections import section_type

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "docs", "examples", "real_megatron", "requirements", "tests", "tools")
PACKAGE_FOLDERS = tuple(sorted(p.name for p in (ROOT / "real_megatron").iterdir() if p.is_dir() and p.name[0] != "_"))
SECTIONS = tuple(name for name, field in RunConfig.model_fields.items() if section_type(field.annotation))


@dataclass(frozen=True)
class Text:
    """Something that people read."""

    file: str
    """Path below the repository root."""
    line: int
    """Line of the file at which it begins, from 1."""
    text: str
    kind: str
    """`markdown`, `comment`, `docstring` or `message` (another string of the program)."""

    def at(self, position: int) -> str:
        """`file:line` of a position in the text."""
        return f"{self.file}:{self.line + self.text.count(chr(10), 0, position)}"


# --- where texts come from ----------------------------------------------------------------------------------------


def repository_texts(root: Path = ROOT) -> Iterator[Text]:
    """Every Markdown document, docstring and comment of the repository, and the strings of the package and tools."""
    for path in sorted([*root.glob("*"), *(p for folder in FOLDERS for p in (root / folder).rglob("*"))]):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        file = str(path.relative_to(root))
        if path.suffix in (".md", ".py", ".yaml", ".yml", ".sh", ".sbatch", ".toml", ".cu", ".cpp", ".h"):
            yield from texts_of(file, path.read_text(encoding="utf-8"))


def texts_of(file: str, content: str) -> Iterator[Text]:
    """The texts of one file."""
    suffix = Path(file).suffix
    if suffix == ".md":
        yield Text(file, 1, content, "markdown")
    elif suffix == ".py":
        yield from _python(file, content)
    else:
        mark = "//" if suffix in (".cu", ".cpp", ".h") else "#"
        for number, line in enumerate(content.splitlines(), 1):
            if mark in line:
                yield Text(file, number, line[line.index(mark) :], "comment")


def _python(file: str, content: str) -> Iterator[Text]:
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield Text(file, token.start[0], token.string, "comment")
    messages = file.startswith(("real_megatron/", "tools/", "benchmarks/"))
    yield from _strings(file, ast.parse(content), messages)


def _strings(file: str, node: ast.AST, messages: bool) -> Iterator[Text]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) and isinstance(child.value.value, str):
            yield Text(file, child.lineno, child.value.value, "docstring")
        elif isinstance(child, ast.JoinedStr):
            if messages:
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in child.values]
                yield Text(file, child.lineno, "".join(map(str, parts)), "message")
            yield from _strings(file, ast.Tuple([p for p in child.values if isinstance(p, ast.FormattedValue)]), False)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            if messages:
                yield Text(file, child.lineno, child.value, "message")
        else:
            yield from _strings(file, child, messages)


# --- paths --------------------------------------------------------------------------------------------------------

_PATH = re.compile(rf"(?<![\w/.$}}…*<>-])(?:{'|'.join({*FOLDERS, *PACKAGE_FOLDERS})})/[\w./*<>{{}}$…\[\]-]*(?:::\w+)?")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def dead_paths(text: Text, root: Path = ROOT) -> list[str]:
    """Paths of the repository that do not exist, and tests (`file.py::test`) that their file does not hold.

    Below a folder of the package (`objective/rewards.py`) only Python files count: `rollout/x` may be a metric.
    Placeholders (`DIR`, `<name>`, `*`, `{layer}`, `…`) stand for any name.
    """
    faults = []
    for match in _PATH.finditer(text.text):
        path, _, test = match[0].partition("::")
        path = path.rstrip(".,:;)")
        in_package = path.partition("/")[0] not in FOLDERS
        if _placeholder(path) or _built(path, root) or (in_package and not path.endswith(".py")):
            continue
        options = [root / path, root / "real_megatron" / path, (root / text.file).parent / path]
        found = next((option for option in options if option.exists()), None)
        if found is None:
            faults.append(f"{text.at(match.start())}: {path} does not exist")
        elif test and f"def {test}(" not in found.read_text(encoding="utf-8"):
            faults.append(f"{text.at(match.start())}: {path} has no test {test}")
    return faults + (_dead_links(text, root) if text.kind == "markdown" else [])


def _placeholder(path: str) -> bool:
    if any(sign in path for sign in "<>*{}$…[]"):
        return True
    # DIR, NAME.json, NAME_cpu.md; not README.md
    return any(re.fullmatch(r"[A-Z][A-Z_]+(\.(?!md\b)\w+)?|NAME\w*\.\w+", part) for part in path.split("/"))


def _built(path: str, root: Path) -> bool:
    """Whether the path is a build output, which git ignores: it exists on some machines only."""
    ignored = (root / ".gitignore").read_text(encoding="utf-8").split() if (root / ".gitignore").is_file() else []
    return any(path.rstrip("/") == line.rstrip("/") for line in ignored)


def _dead_links(text: Text, root: Path) -> list[str]:
    faults = []
    for match in _LINK.finditer(text.text):
        target, _, anchor = match[1].partition("#")
        if "://" in target:
            continue
        path = (root / text.file).parent / target if target else root / text.file
        where = text.at(match.start())
        if target and not path.exists():
            faults.append(f"{where}: the link {match[1]} leads nowhere")
        elif anchor:
            content = text.text if not target else path.read_text(encoding="utf-8")
            if anchor not in _anchors(content):
                faults.append(f"{where}: {target or 'this document'} has no heading #{anchor}")
    return faults


def _anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    plain = _FENCE.sub("", markdown)
    titles = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# --- configuration keys -------------------------------------------------------------------------------------------

_KEY = re.compile(rf"(?<![\w/.$…{{-])(?:{'|'.join(SECTIONS)})(?:\.(?:\w+|\*))+(?![\w(/])")
_VALUE = re.compile(r"=([A-Za-z]\w*)")
# Files and tensors whose names begin like a section.
_FILE = re.compile(r"\.(jsonl|json|safetensors|py|yaml|md|png|txt|log|pt)$")
_TENSOR = re.compile(r"model\.(embed_tokens|layers|norm)\b|model\.safetensors")
_YAML_BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.DOTALL | re.MULTILINE)


def dead_keys(text: Text) -> list[str]:
    """Dotted configuration keys, and keys of YAML blocks in documents, that `RunConfig` does not have.

    In the code a section's word may also be a module or a variable (`rollout.engine`, `scale.score_ids`): what is an
    attribute in the package is no fault in a docstring or comment, nor the name of a module where it is a whole string.
    """
    faults = []
    for match in _KEY.finditer(text.text):
        key = match[0]
        if _FILE.search(key) or _TENSOR.match(key):
            continue
        found, annotation = _look_up(key)
        if found:
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            value = _VALUE.match(text.text, match.end())
            if choices and value and value[1] not in map(str, choices) and value[1].upper() != value[1]:
                faults.append(f"{text.at(match.start())}: {key} has no value {value[1]}")
            continue
        if text.kind in ("docstring", "comment") and _is_attribute(key):
            continue
        if text.kind == "message" and text.text == key and _is_module(key):
            continue
        faults.append(f"{text.at(match.start())}: no configuration key {key}")
    if text.kind == "markdown":
        for match in _YAML_BLOCK.finditer(text.text):
            tree = yaml.safe_load(match[1])
            if isinstance(tree, dict) and set(tree) <= set(RunConfig.model_fields):
                dead = [key for key in _flat(tree) if not known_key(key)]
                faults += [f"{text.at(match.start())}: no configuration key {key}" for key in dead]
    return faults


def known_key(key: str) -> bool:
    """Whether a dotted key names a value or section; list items by number or `*`, dictionary entries by any name."""
    return _look_up(key)[0]


def _look_up(key: str) -> tuple[bool, Any]:
    """Whether there is such a key, and its annotation."""
    annotation: Any = RunConfig
    for part in key.split("."):
        if get_origin(annotation) is list:
            if not (part.isdigit() or part in ("*", "i", "N")):
                return False, None
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif part == "*":  # data.*.format: of any entry of the section's lists and dictionaries
            inner = [section_type(f.annotation) for f in annotation.model_fields.values() if get_origin(f.annotation)]
            annotation = next((found for found in inner if found is not None), None)
        else:
            fields = annotation.model_fields if _is_section(annotation) else {}
            if part not in fields:
                return False, None
            annotation = fields[part].annotation
            if get_origin(annotation) not in (list, dict, Literal):
                annotation = section_type(annotation)
    return True, annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel)


def _flat(tree: Any, prefix: str = "") -> Iterator[str]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield f"{prefix}{name}"
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from _flat(value, f"{prefix}{name}.")


def _is_attribute(dotted: str) -> bool:
    """Whether `x.name` can be read as Python: a module or folder `x` with `name`, or a class that ends like `x`."""
    owner, _, name = dotted.partition(".")
    return name.partition(".")[0] in _attributes().get(owner, set())


def _is_module(dotted: str) -> bool:
    return (ROOT / "real_megatron" / dotted.replace(".", "/")).with_suffix(".py").is_file()


_ATTRIBUTES: dict[str, set[str]] = {}


def _attributes() -> Mapping[str, set[str]]:
    """Per section's word: the names in modules and folders of that name, and in classes whose name ends with it."""
    if not _ATTRIBUTES:
        for path in (ROOT / "real_megatron").rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            _ATTRIBUTES.setdefault(path.stem, set()).update(_names(tree))
            if path.parent.name in SECTIONS:
                _ATTRIBUTES.setdefault(path.parent.name, set()).add(path.stem)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and not node.name.endswith("Config"):
                    word = re.split(r"(?=[A-Z])", node.name)[-1].lower()
                    _ATTRIBUTES.setdefault(word, set()).update(_names(node))
    return _ATTRIBUTES


def _names(node: ast.Module | ast.ClassDef) -> set[str]:
    """Names that a module or class defines."""
    names = set()
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(child.name)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        elif isinstance(child, ast.Assign):
            names.update(target.id for target in child.targets if isinstance(target, ast.Name))
    return names


# --- commands -----------------------------------------------------------------------------------------------------

_COMMAND = re.compile(r"(?:real-megatron|-m real_megatron)((?: --?[a-z]+)* [^`\n#;]*)")
_NAME = r"[a-z][a-z-]+"
# Words that may follow the program's name in a sentence.
_PROSE = {"is", "and", "or", "the", "command", "commands", "has", "reads", "writes", "with"}


def dead_commands(text: Text) -> list[str]:
    """Commands `real-megatron X` (also `X | Y | …`, and of a group: `X Y`) and their options that do not exist."""
    faults = []
    for match in _COMMAND.finditer(text.text):
        where = text.at(match.start())
        words = re.split(r"&&|\s\(|\)|(?<=\w)[,.](?:\s|$)", match[1])[0].split()
        while words and words[0].startswith("-"):
            words.pop(0)
        if not words or words[0] in _PROSE or not re.fullmatch(_NAME, words[0]):
            continue
        names = [words.pop(0)]
        while len(words) > 1 and words[0] == "|":
            names.append(words[1])
            words = words[2:]
        for name in names:
            faults += [f"{where}: {fault}" for fault in _command_faults(name, words)]
    return faults


def _command_faults(name: str, words: list[str]) -> list[str]:
    command = _commands().get(name)
    if command is None:
        return [f"no command real-megatron {name}"]
    group = getattr(command, "commands", None)
    if group is not None and words and re.fullmatch(_NAME, words[0]):
        name, command = f"{name} {words[0]}", group.get(words[0])
        if command is None:
            return [f"no command real-megatron {name}"]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    options = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
    return [f"real-megatron {name} has no option {o}" for o in options if o not in known | {"--help", "--traceback"}]


def _commands() -> Mapping[str, Any]:
    from real_megatron.cli import app

    commands: Mapping[str, Any] = vars(typer.main.get_command(app))["commands"]
    return commands


# --- words --------------------------------------------------------------------------------------------------------

# What only those who build the project know, or what does not exist. A module of that name makes the word legal.
FORBIDDEN = {
    r"\bDESIGN\.md": "a document that the repository does not hold",
    r"\bthe planner\b": "there is no planner",
    r"(?<![\w/.])planning/": "there is no such folder",
    r"(?<![\w/.-])shared/": "a folder outside of the repository",
}


def forbidden_words(text: Text, root: Path = ROOT) -> list[str]:
    """Words that name what a reader of the repository cannot find."""
    # policy/ has a Planner of micro-batches.
    planner = root / "real_megatron" / ("policy/plan.py" if "real_megatron/policy/" in text.file else "planning")
    exists = {"the planner": planner, "planning/": root / "real_megatron/planning"}
    faults = []
    for pattern, why in FORBIDDEN.items():
        for match in re.finditer(pattern, text.text):
            if not exists.get(match[0], root / "does-not-exist").exists():
                faults.append(f"{text.at(match.start())}: {match[0]}: {why}")
    return faults


# --- metrics ----------------------------------------------------------------------------------------------------------


def explained_metrics(root: Path = ROOT) -> set[str]:
    """The metrics that docs/reading_a_run.md explains, with NAME for a test set and DECODING for `rail`, `sampled`."""
    text = (root / "docs/reading_a_run.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("\n## Every metric\n")[2].splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def metric_pattern(name: str) -> str:
    """The name of a run's metric as `explained_metrics` has it."""
    name = re.sub(r"^eval/[^/]+/", "eval/NAME/", name)
    return re.sub(r"^eval/NAME/(rail|sampled)/", "eval/NAME/DECODING/", name)


# --- code blocks --------------------------------------------------------------------------------------------------

_INCLUDED = re.compile(r"^```\w+ ([\w./-]+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def included_files(text: Text) -> dict[str, str]:
    """The code blocks of a document that name their file behind the language, by that file."""
    return {match[1]: match[2] for match in _INCLUDED.finditer(text.text)}


def differing_blocks(text: Text, root: Path = ROOT) -> list[str]:
    """Code blocks that name a file and are not its content."""
    faults = []
    for match in _INCLUDED.finditer(text.text):
        path = root / match[1]
        if not path.is_file():
            faults.append(f"{text.at(match.start())}: {match[1]} does not exist")
        elif path.read_text(encoding="utf-8") != match[2]:
            faults.append(f"{text.at(match.start())}: the block differs from {match[1]}")
    return faults


CHECKS: dict[str, Callable[[Text], list[str]]] = {
    "paths": dead_paths,
    "keys": dead_keys,
    "commands": dead_commands,
    "words": forbidden_words,
    "blocks": differing_blocks,
}
