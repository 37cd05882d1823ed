"""docs/data.md: its files load as it says, its errors read as it says, its tables name the fields that there are."""

import doctest
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from real_megatron.config import RunConfig
from real_megatron.data import load_examples
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.data.formats import FORMATS
from real_megatron.errors import UserError
from real_megatron.evaluation.result import Prediction
from real_megatron.judging.judge import Score
from real_megatron.scores import ScoreScale

DOCUMENT = Path(__file__).parents[1] / "docs/data.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:(File|Configuration|Loads as|Error)(?: `([^`\n]*)`)?:\n\n)?```(\w+)\n(.*?)^```", re.M | re.S)


def loaded(config: RunConfig) -> str:
    """What the examples of a configuration are, a line each, or why they are none."""
    scale = ScoreScale.of(byte_tokenizer(), config.scale)
    rows = []
    try:
        for source in config.data.train:
            for e in load_examples(source, config.data.template, scale.values, aspects=scale.aspects):
                label = list(e.labels) if scale.aspects else e.label
                rows.append({"id": e.id, "label": label, "messages": e.messages, "cot": e.cot})
        for test_set in config.data.eval.values():
            keep = [column for column in (test_set.cluster, test_set.within) if column]
            load_examples(test_set, config.data.template, scale.values, keep)
    except UserError as error:
        return f"{error}\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_example_loads_or_is_refused_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, seen = "", []
    for kind, name, language, text in BLOCK.findall(TEXT):
        seen.append(kind)
        if kind == "File":
            Path(name).write_text(text, encoding="utf-8")
        elif kind == "Configuration":
            found = loaded(RunConfig.model_validate(yaml.safe_load(text)))
        elif kind:
            assert found == text
        else:
            assert language == "python", "a block that no test runs: say what it is"
    assert seen.count("Configuration") == seen.count("Loads as") + seen.count("Error") > 8
    assert seen.count("") == 1 and TEXT.count("```") == 2 * len(seen)


def test_the_numbers_of_its_rewards_are_right() -> None:
    (code,) = [text for kind, _, _, text in BLOCK.findall(TEXT) if not kind]
    example = doctest.DocTestParser().get_doctest(code, {}, "data.md", str(DOCUMENT), 0)
    assert len(example.examples) > 5 and doctest.DocTestRunner().run(example).failed == 0


def named(heading: str) -> set[str]:
    """What the first column of the section's tables, and the list at its end, names in code style."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def test_it_names_every_format() -> None:
    ours = {name for name, module in FORMATS._module_of.items() if module.startswith("real_megatron.")}
    assert named("Published formats") - {"module:name"} == ours


def test_it_names_every_field_of_results() -> None:
    assert {field.name for field in fields(Score)} | {"id", "row"} == named("What `judge` reads and writes")
    rest = TEXT.partition("## What other commands write")[2]
    assert all(f"`{field.name}`" in rest for field in fields(Prediction))
