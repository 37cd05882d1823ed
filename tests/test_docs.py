"""Generated documents are in step with the code that generates them."""

from pathlib import Path

from real_megatron.config import RunConfig
from real_megatron.sections import describe_keys, section_type

ROOT = Path(__file__).parents[1]


def test_the_configuration_reference_is_in_step() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == describe_keys(RunConfig), "run: python -m real_megatron.config > docs/configuration.md"


def test_every_key_has_a_description() -> None:
    sections, seen = [RunConfig], set()
    while sections:
        section = sections.pop()
        seen.add(section)
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            inner = section_type(field.annotation)
            if inner is not None and inner not in seen:
                sections.append(inner)
