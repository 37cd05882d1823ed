from pathlib import Path

import pytest

from real_megatron.data import load_template
from real_megatron.data.template import FOLDER, Template
from real_megatron.errors import ConfigError


def test_fields_are_inserted_once_and_as_they_are() -> None:
    template = Template("t", 'a {x} {{x}} {"json": {y}} { x } {}')
    assert template.fields == ["x", "y"]
    assert template.render({"x": "{y} {{z}}", "y": "2"}) == 'a {y} {{z}} {x} {"json": 2} { x } {}'


def test_a_missing_field_is_an_error() -> None:
    with pytest.raises(KeyError, match="y"):
        Template("t", "{x}{y}").render({"x": "1"})


def test_built_in_templates() -> None:
    assert load_template("plain").render({"prompt": " a\n"}) == " a\n"
    assert {path.stem for path in FOLDER.iterdir()} == {"plain", "prometheus"}
    fields = load_template("prometheus").fields
    assert fields[:3] == ["orig_instruction", "orig_response", "orig_reference_answer"] and len(fields) == 9


def test_a_file_and_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Grade: {prompt}\n\n")
    assert load_template(str(file)).render({"prompt": "x"}) == "Grade: x\n"  # one final newline is the file's
    with pytest.raises(ConfigError, match=r"'nothere' is neither a built-in template \(plain, prometheus\) nor a file"):
        load_template("nothere")
    file.write_text("Grade: { prompt }")
    with pytest.raises(ConfigError, match=r"mine.txt: no placeholder such as \{prompt\}"):
        load_template(str(file))
    file.write_bytes(b"\xff{prompt}")
    with pytest.raises(ConfigError, match="mine.txt: not UTF-8"):
        load_template(str(file))
