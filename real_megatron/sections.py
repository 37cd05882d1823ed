"""Strict configuration sections: YAML files and `a.b=c` overrides into pydantic models; errors name the place.

Knows no particular section: `config.py` declares those.
"""

import difflib
import inspect
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from real_megatron.errors import ConfigError

LARGEST = 2**31 - 1
"""Of whole numbers: far beyond what any key can mean, and what every library can count with."""
_PLAIN_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|0|[1-9][0-9_]*)")
_NO_CHARACTER = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
"""NUL, and half characters other than those by which Python names the bytes of a path that is no UTF-8."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, numbers are finite, assignments are validated.

    `true` and `false` are no numbers, whole numbers end at `LARGEST`, and texts can be written to a file.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if section_type(kind) is not None:  # checks its own
            return value
        kinds = _leaves(kind)
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        truths = [part for part in parts if isinstance(part, bool)]
        if truths and bool not in kinds and any(k in (int, float) or type(k) is int for k in kinds):
            raise ValueError(f"a number is needed, not {str(truths[0]).lower()}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"a number of {len(str(abs(value)))} digits; at most {LARGEST} is possible")
        for text in parts:
            if isinstance(text, str) and (found := _NO_CHARACTER.search(text)):
                raise ValueError(f"the text {text!r} holds {found[0]!r}, which is no character of a text; remove it")
        return value

    @classmethod
    def from_yaml(cls, path: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file (None: defaults only), apply overrides `a.b=value` (values are YAML) and validate.

        Raises ConfigError when the file cannot be read, a key is unknown or repeated, or a value does not fit. Every
        fault found is listed, each with its file and line, or its override.
        """
        tree, lines = _read(path)
        return cls._validated(tree, overrides, path, lines)

    @classmethod
    def from_tree(cls, tree: dict[str, Any], overrides: Sequence[str] = (), source: str | Path | None = None) -> Self:
        """The same from plain dictionaries; `source` is where they come from, for messages."""
        return cls._validated(json.loads(json.dumps(tree)), overrides, source, {})

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """A copy with `a.b=value` overrides applied. Raises ConfigError as `from_yaml` does.

        Only what has been set counts as given: a default that depends on another key follows an override of that key.
        """
        return self.from_tree(self._given(), overrides)

    def _given(self) -> dict[str, Any]:
        """The values that were set, whether or not their section was. Lists and dictionaries are included always, since
        they may have been changed in place."""
        dumped, tree = self.model_dump(mode="json"), {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                tree[name] = value._given()
            elif name in self.model_fields_set or isinstance(value, list | dict):
                tree[name] = dumped[name]
        return tree

    @classmethod
    def _validated(
        cls,
        tree: dict[str, Any],
        overrides: Sequence[str],
        path: str | Path | None,
        lines: dict[tuple[str, ...], int],
    ) -> Self:
        sources: dict[tuple[str, ...], str] = {}
        for override in overrides:
            _apply(tree, override, sources)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            faults = [_explain(cls, fault, path, lines, sources) for fault in error.errors()]
            raise ConfigError("\n".join(dict.fromkeys(faults))) from None

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, defaults included; `from_yaml` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaf keys and sections of a model."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = section_type(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (list, dict):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names; an empty one is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation `S`, `S | None`, `list[S]` or `dict[str, S]`; None when there is none."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in (list, dict, Union, UnionType):
        for argument in get_args(annotation):
            inner = section_type(argument)
            if inner is not None:
                return inner
    return None


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain dictionaries, not validated. Raises ConfigError when it cannot be read."""
    return _read(path)[0]


def _read(path: str | Path | None) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Parse a YAML file into a tree and the line number of each key path."""
    if path is None:
        return {}, {}
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}); name the YAML file of a run"
        ) from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the configuration is not UTF-8 text; save the file as UTF-8") from None
    lines: dict[tuple[str, ...], int] = {}
    tree = _parse(text, str(path), lines)
    if tree is None:
        return {}, lines
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the file must hold `key: value` lines, not a {type(tree).__name__}")
    return tree, lines


class _Loader(yaml.SafeLoader):
    """YAML without the numbers of YAML 1.1 that nobody means: 010 (8) and 1:30 (90)."""


def _number_as_written(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = node.value
    if ":" in text or (node.tag.endswith(":int") and not _PLAIN_NUMBER.fullmatch(text)):
        raise yaml.MarkedYAMLError(
            problem=f"{text} is not read as it stands there; write the number without leading zeros and colons, or put "
            "a text in quotes",
            problem_mark=node.start_mark,
        )
    if node.tag.endswith(":int") and len(text) > 1000:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    if node.tag.endswith(":int"):
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number_as_written)


def _parse(text: str, where: str, lines: dict[tuple[str, ...], int] | None = None) -> Any:
    """The value of a YAML text, and in `lines` (for a file) the line of each key.

    Raises ConfigError, which begins with `where`, for what is no YAML and for keys that are set twice.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        _number(where, node, (), {} if lines is None else lines, lines is not None)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark is not None and lines is not None else ""
        raise ConfigError(f"{where}{at}: not valid YAML: {_reason(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}; remove it") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or an alias that holds itself") from None
    except (TypeError, ValueError) as error:  # what looks like a date, but is none
        raise ConfigError(f"{where}: not valid YAML: {error}; put a text in quotes") from None


_YAML_HINTS = {
    r"'\\t'": "indent with spaces, not with tabs",
    "alias|anchor": "put a text that begins with * or & in quotes",
    "constructor": "tags are not read: remove what begins with !, or put the text in quotes",
    "document": "remove the line ---",
    "unhashable": "a key must be one word",
    "not allowed here": "put a text that holds `: ` in quotes",
}


def _reason(error: yaml.MarkedYAMLError) -> str:
    """What is wrong, in one line, and what to do about it."""
    text = ", ".join(filter(None, (error.context, error.problem)))
    hint = next((hint for pattern, hint in _YAML_HINTS.items() if re.search(pattern, text)), None)
    return text + (f"; {hint}" if hint else "" if ";" in text else "; correct brackets, quotes and indentation there")


def _number(
    where: str, node: yaml.Node, at: tuple[str, ...], lines: dict[tuple[str, ...], int], in_file: bool = True
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                place, first = (f":{line}", f" (first on line {lines[here]})") if in_file else ("", "")
                raise ConfigError(f"{where}{place}: `{'.'.join(here)}` is set twice{first}; keep one")
            lines[here] = line
            _number(where, value, here, lines, in_file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*at, str(index))
            lines[here] = value.start_mark.line + 1
            _number(where, value, here, lines, in_file)


def _apply(tree: dict[str, Any], override: str, sources: dict[tuple[str, ...], str]) -> None:
    """Set one `a.b=value` in the tree, creating sections on the way; list items are addressed by number."""
    dotted, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"override `{override}`: write it as key=value, for example optimizer.lr=1e-6")
    value = _parse(text, f"override `{override}`") if text.strip() else ""
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) > len(node):
                raise ConfigError(
                    f"override `{override}`: `{'.'.join(keys[:depth])}` is a list of {len(node)} items in the file; "
                    f"`{key}` must be a number from 0 to {len(node)}"
                )
            if int(key) == len(node):
                node.append({})
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not last and node.get(key) is None:
                node[key] = [] if keys[depth + 1].isdigit() else {}
        else:
            raise ConfigError(f"override `{override}`: `{'.'.join(keys[:depth])}` is a value, it has no keys")
        if last:
            node[index] = value
        node = node[index]
    sources[keys] = override


def _explain(
    model: type[BaseModel],
    fault: Any,
    path: str | Path | None,
    lines: dict[tuple[str, ...], int],
    sources: dict[tuple[str, ...], str],
) -> str:
    """One line for one pydantic error: where, which key, what is wrong, and the nearest known key."""
    loc = tuple(str(part) for part in fault["loc"])
    # The override of the faulty key or of a section around it; else of a key inside of what is faulty as a whole.
    known = [key for key in sources if loc[: len(key)] == key] or [
        key for key in sources if loc and key[: len(loc)] == loc
    ]
    if not known and loc[:-1] not in lines:  # a section that an override has made lacks a key
        known = [key for key in sources if loc[:-1] and key[: len(loc) - 1] == loc[:-1]]
    if known:
        where = f"override `{sources[known[-1]]}`"
    elif path is None:
        where = "configuration"
    else:
        numbered = [loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines]
        where = f"{path}:{lines[numbered[0]]}" if numbered else str(path)
    key = _shown(loc)
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_nearest(model, loc)}"
    if fault["type"] == "missing":
        return f"{where}: `{key}` is required and not set"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("model_type", "dict_type"):
        message = "must be `key: value` lines of its own; indent them below it, or remove it"
    elif fault["type"] == "list_type":
        message = "must be a list, as in [a, b]"
    elif fault["type"] == "invalid_key":
        return f"{where}: unknown key `{key}`: keys are texts; known keys here: {', '.join(_siblings(model, loc))}"
    elif loc and loc[-1] in ("bool", "int", "float", "str") and fault["type"].endswith(("_type", "_parsing")):
        key, message = (
            ".".join(loc[:-1]),
            "must be true or false, a number or a text",
        )  # each kind has a fault of its own
    if fault["type"] == "value_error":  # raised by a check of our own: it says itself what is wrong
        return f"{where}: {key + ': ' if key else ''}{message}"
    if fault["type"] == "string_type" and (loc[-1] == "[key]" or isinstance(fault["input"], bool | date)):
        what, key = ("a key", _shown(loc[:-2])) if loc[-1] == "[key]" else ("it", key)
        return f'{where}: `{key}`: YAML reads {what} as {fault["input"]}, not as text; put it in quotes, as in "yes"'
    return f"{where}: `{key}`: {message} (got {fault['input']!r})"


def _nearest(model: type[BaseModel], loc: tuple[str, ...]) -> str:
    """Suggest the sibling that is spelt nearest, else (nearly) the same name elsewhere, else list the siblings."""
    siblings = _siblings(model, loc)
    prefix = "".join(part + "." for part in loc[:-1])
    close = difflib.get_close_matches(loc[-1], siblings, n=1)
    if close:
        return f"; did you mean `{prefix}{close[0]}`?"
    everywhere = {key.rsplit(".", 1)[-1]: key for key in reversed(known_keys(model))}
    close = difflib.get_close_matches(loc[-1], everywhere, n=1, cutoff=0.9)
    if close:
        return f"; did you mean `{everywhere[close[0]]}`?"
    return f"; known keys here: {', '.join(siblings)}"


def _shown(loc: tuple[str, ...]) -> str:
    """A key for a message, which is one line."""
    key = ".".join(loc)
    return key if key.isprintable() else repr(key)[1:-1]


def _leaves(annotation: Any) -> list[Any]:
    """The types in an annotation that hold no others, and the values of a Literal."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]


def _siblings(model: type[BaseModel], loc: tuple[str, ...]) -> list[str]:
    """The keys of the section in which a key stands."""
    holder: Any = model
    for part in loc[:-1]:
        field = holder.model_fields.get(part) if holder else None
        if field is not None:  # other parts are list numbers and dictionary names inside the last field
            holder = section_type(field.annotation)
    return list(holder.model_fields) if holder else []


def describe_keys(model: type[BaseModel]) -> str:
    """Markdown reference of every section and key of a model: type, default and description."""
    parts = [
        "# Configuration\n",
        "Written by `python -m real_megatron.config > docs/configuration.md`; do not edit by hand.\n",
        "A run is described by a YAML file of these sections. Keys that are not set keep their default, unknown keys "
        "are errors, and `section.key=value` after the file on the command line overrides one value (list items by "
        "number: `data.train.0.limit=100`). Paths are relative to the directory the command runs in. Every run saves "
        "the whole resolved configuration as `config.yaml` in its output directory.\n",
        _table("Top level", model, ""),
    ]
    pending = [(name, field) for name, field in model.model_fields.items() if section_type(field.annotation)]
    while pending:
        name, field = pending.pop(0)
        inner = section_type(field.annotation)
        assert inner is not None
        kind = get_origin(field.annotation)
        item = "[i]" if kind is list else ".NAME" if kind is dict else ""
        parts.append(_table(f"`{name}{item}`", inner, f"{inspect.getdoc(inner)}\n\n"))
        nested = [(f"{name}.{n}", f) for n, f in inner.model_fields.items() if section_type(f.annotation)]
        pending = nested + pending
    return "\n".join(parts)


def _table(title: str, model: type[BaseModel], text: str) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if field.is_required():
            default = "required"
        elif section_type(field.annotation):
            default = ""
        else:
            value = field.get_default(call_default_factory=True)
            default = f"`{json.dumps(value if not isinstance(value, Path) else str(value), ensure_ascii=False)}`"
        bounds = [
            f"{sign} {getattr(rule, attribute):g}"
            for rule in field.metadata
            for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
            if getattr(rule, attribute, None) is not None
        ]
        kind = ", ".join([_type_name(field.annotation), *bounds])
        rows.append(f"| `{name}` | {kind} | {default} | {field.description} |")
    table = "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows])
    return f"## {title}\n\n{text}{table}\n"


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    inner = section_type(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in get_args(annotation))
    if get_origin(annotation) is list:
        return "list of " + ("sections" if inner else _type_name(get_args(annotation)[0]))
    if get_origin(annotation) is dict:
        return "name → " + ("section" if inner else _type_name(get_args(annotation)[1]))
    if inner is not None:
        return "section"
    return {Path: "path", str: "text", int: "integer", float: "number", bool: "true/false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )
