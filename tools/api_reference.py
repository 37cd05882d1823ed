"""Writes docs/api.md: what `real_megatron` exports, from its signatures and docstrings.

python tools/api_reference.py > docs/api.md
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

HEAD = """# Library reference

Written by `python tools/api_reference.py > docs/api.md`; do not edit by hand.

What `from {name} import …` offers. Each name is loaded on first use, so that importing `{name}` costs nothing.
"""


def reference(package: ModuleType) -> str:
    """The Markdown reference of what `package.__all__` lists, by kind and in that order, without `__version__`."""
    items = {name: getattr(package, name) for name in package.__all__ if not name.startswith("__")}
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Other": []}
    for name, item in items.items():
        kinds[_kind(item)].append(name)
    parts = [HEAD.format(name=package.__name__)]
    for kind, names in kinds.items():
        if names:
            parts.append(f"## {kind}\n")
            parts += [_entry(name, items[name], kind) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def _kind(item: Any) -> str:
    if inspect.isclass(item):
        return "Errors" if issubclass(item, BaseException) else "Classes"
    return "Functions" if inspect.isroutine(item) else "Other"


def _entry(name: str, item: Any, kind: str) -> str:
    if kind == "Functions":
        return f"### {name}\n\n{_code(name + _signature(item))}\n{_doc(item)}\n"
    if kind == "Errors":
        base = item.__mro__[1].__name__
        return f"### {name}\n\nA kind of `{base}`. {_doc(item)}\n"
    if kind == "Classes":
        return f"### {name}\n\n" + "\n".join(_class(name, item))
    text = repr(item)
    return f"### {name}\n\n`{name}` = {text if len(text) <= 200 else type(item).__name__}\n"


def _class(name: str, cls: type) -> Iterator[str]:
    fields = getattr(cls, "model_fields", None)  # a pydantic model: every key is in docs/configuration.md
    is_data = dataclasses.is_dataclass(cls)
    is_protocol = getattr(cls, "_is_protocol", False)  # is fulfilled, not called
    if fields is None and not is_data and not is_protocol:
        yield _code(name + _signature(cls))
    yield _doc(cls) + "\n"
    own_init = cls.__dict__.get("__init__")
    if fields is None and not is_data and not is_protocol and own_init is not None and own_init.__doc__:
        yield _doc(own_init) + "\n"
    if fields is not None:
        yield "The fields are the keys of [configuration.md](configuration.md).\n"
    elif is_data:
        yield "\n".join(_fields(cls)) + "\n"
    for member, value in _members(cls):
        if isinstance(value, property):
            returns = inspect.signature(value.fget).return_annotation if value.fget else Any
            yield f"- `{member}`: {_annotation(returns)}. {_flat(_doc(value))}\n"
        else:
            bound = getattr(cls, member)
            skip_self = not isinstance(value, classmethod | staticmethod)
            code = _code(f"{name}.{member}{_signature(bound, skip_self)}")
            yield f"#### {name}.{member}\n\n{code}\n{_doc(bound)}".rstrip() + "\n"


def _fields(cls: Any) -> Iterator[str]:
    texts = _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        default = ""
        if field.default is not dataclasses.MISSING:
            default = f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f" = {getattr(field.default_factory, '__name__', '…')}()"
        text = texts.get(field.name, "")
        yield f"- `{field.name}`: {_annotation(field.type)}{default}" + (f". {_flat(text)}" if text else "")


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, inherited ones too where this project's code (not a library's) defines them."""
    seen: dict[str, Any] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != cls.__module__.partition(".")[0]:
            continue
        for name, value in vars(base).items():
            shown = isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
            if shown and not name.startswith("_"):
                seen.setdefault(name, value)
    yield from seen.items()


def _attribute_docs(cls: type) -> dict[str, str]:
    """The strings below the fields of a class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for before, node in zip(body, body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                docs[before.target.id] = inspect.cleandoc(node.value.value)
    return docs


def _signature(item: Any, skip_first: bool = False) -> str:
    signature = inspect.signature(item)
    parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
    parts: list[str] = []
    starred = False
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        mark = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        mark = "**" if parameter.kind is parameter.VAR_KEYWORD else mark
        text = mark + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_default(parameter.default)}"
        parts.append(text)
        positional_only = parameter.kind is parameter.POSITIONAL_ONLY
        if positional_only and (index + 1 == len(parameters) or parameters[index + 1].kind is not parameter.kind):
            parts.append("/")
    returns = signature.return_annotation
    arrow = "" if returns is signature.empty or inspect.isclass(item) else f" -> {_annotation(returns)}"
    line = f"({', '.join(parts)}){arrow}"
    return line if len(line) <= 90 else "(\n    " + ",\n    ".join(parts) + f",\n){arrow}"


def _annotation(annotation: Any) -> str:
    """As one writes it, without the modules."""
    if isinstance(annotation, str):
        text = annotation
    elif isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        text = annotation.__name__
    else:
        text = inspect.formatannotation(annotation)
    text = re.sub(r"ForwardRef\('([^']+)'[^)]*\)", r"\1", text)
    if "Literal" not in text:
        text = re.sub(r"'(\w+)'", r"\1", text)
    text = re.sub(r"~(\w)", r"\1", text)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text).replace("NoneType", "None")


def _default(value: Any) -> str:
    text = repr(value)
    if text.startswith("<"):  # an object without a literal: a function, a device
        return getattr(value, "__name__", "…")
    return text


def _doc(item: Any) -> str:
    """The docstring; what it says of the item's parameters (`name: meaning`) becomes a list."""
    text = (inspect.getdoc(item) or "").strip()
    names = _parameter_names(item)
    return "\n\n".join(_paragraph(paragraph, names) for paragraph in text.split("\n\n"))


def _parameter_names(item: Any) -> list[str]:
    if not callable(item) or inspect.isclass(item) and issubclass(item, BaseException):
        return []
    try:
        return list(inspect.signature(item).parameters)
    except (TypeError, ValueError):
        return []


def _paragraph(text: str, names: list[str]) -> str:
    """A paragraph; from its first line that begins with a parameter's name and a colon on, as a list.

    Further parameters begin at the start of a line, or behind a full stop.
    """
    name = "(?:" + "|".join(map(re.escape, names)) + ")"
    label = rf"{name}(?:, {name})*(?=: )"
    first = re.search(rf"^{label}", text, re.MULTILINE) if names else None
    if first is None:
        return text
    starts = [found.start(1) for found in re.finditer(rf"(?:^|(?<=\. ))({label})", text, re.MULTILINE)]
    starts = [start for start in starts if start >= first.start()]
    items = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
    lines = [f"- `{item.partition(': ')[0]}`: {_flat(item.partition(': ')[2])}" for item in items]
    lead = text[: first.start()].rstrip()
    return "\n".join([*([lead, ""] if lead else []), *lines])


def _flat(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


if __name__ == "__main__":
    import real_megatron

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # it becomes a file
    print(reference(real_megatron), end="")
