"""Prompt templates: text files with `{name}` where a field of the record goes."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from real_megatron.errors import ConfigError

FOLDER = Path(__file__).parent / "templates"
PLAIN = "plain"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Template:
    """A prompt template. `{name}` is replaced by the record's field, `{{name}}` is written as `{name}`; every other
    brace is literal. Fields are inserted as they are: braces in them have no meaning."""

    name: str
    text: str

    @cached_property
    def fields(self) -> list[str]:
        """Names of the fields it needs, in order of appearance."""
        return list(dict.fromkeys(name for _, name in PLACEHOLDER.findall(self.text) if name))

    def render(self, fields: Mapping[str, str]) -> str:
        """The prompt. Raises KeyError for a field that `fields` lacks."""
        return PLACEHOLDER.sub(lambda m: f"{{{m[1]}}}" if m[1] else fields[m[2]], self.text)


def is_built_in(template: str) -> bool:
    """Whether a template of this name comes with this package; any other name is a file's."""
    return template in _built_in()


def _built_in() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.glob("*.txt")}


def load_template(template: str | Template) -> Template:
    """A built-in template by name (`plain`: the prompt as it is; `prometheus`: Prometheus' absolute grading with a
    reference answer, from the fields of Feedback Collection), or one from a UTF-8 file.

    One final newline of the file does not belong to the prompt. Raises ConfigError if there is no such template, or if
    it is not UTF-8 text or has no placeholder.
    """
    if isinstance(template, Template):
        return template
    built_in = _built_in()
    path = built_in.get(template, Path(template))
    if not os.path.isfile(path):  # false, too, for what no file system takes as a name
        raise ConfigError(
            f"data.template: {template!r} is neither a built-in template ({', '.join(sorted(built_in))}) nor a file"
        )
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.template: {path}: not UTF-8 text ({error.reason}); save the template as UTF-8"
        ) from None
    result = Template(template, text)
    if not result.fields:
        raise ConfigError(
            f"data.template: {path}: no placeholder such as {{prompt}}: every example would get the same prompt"
        )
    return result
