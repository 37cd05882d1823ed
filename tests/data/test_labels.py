"""Labels of several aspects, in the forms that files have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from real_megatron.config import DataSource
from real_megatron.data import JudgeExample, load_examples
from real_megatron.data.formats import FORMATS, read_prompt, register_format
from real_megatron.errors import ConfigError, DataError
from real_megatron.scores import Aspect

ASPECTS = (Aspect("tone", ["1", "2", "3"], [1.0, 2.0, 3.0], 0, 1.0), Aspect("facts", ["0", "9"], [0.0, 9.0], 3, 3.0))


def load(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> list[JudgeExample]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a"} | row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataSource(path=str(path), **fields), values=[0.0, 9.0], aspects=ASPECTS)


def test_a_list_a_mapping_and_columns_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"label": [1, 4.5]},
        {"label": {"facts": 4.5, "tone": 1}},
        {"label.tone": 1, "label.facts": 4.5},
        {"label": {"facts": [4, 5, None], "tone": "1"}},
        {"label": [None, 9]},
        {"label": {"tone": 2}},
        {"label.facts": 0},
    ]
    found = load(tmp_path, rows)
    assert [e.labels for e in found] == [*[(1.0, 4.5)] * 4, (None, 9.0), (2.0, None), (None, 0.0)]
    # The mean by weight, over those that are there.
    assert [e.label for e in found] == [*[(1 + 3 * 4.5) / 4] * 4, 9.0, 2.0, 0.0]


def test_columns_and_words_are_mapped(tmp_path: Path) -> None:
    columns = {"label.tone": "Tone", "label.facts": "Facts"}
    words = {"bad": 0.0, "fair": 1.0, "good": 3.0}
    rows = [{"Tone": "good", "Facts": "bad"}, {"Tone": "fair", "Facts": None}]
    assert [e.labels for e in load(tmp_path, rows, columns=columns, labels=words)] == [(3.0, 0.0), (1.0, None)]
    rows = [{"label": {"tone": "fair", "facts": ["bad"]}}, {"label": ["good", "bad"]}]
    assert [e.labels for e in load(tmp_path, rows, labels=words)] == [(1.0, 0.0), (3.0, 0.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"label": 2},
            "'label' is 2; with scale.aspects it must be a list of 2 labels .*or an object with the keys tone",
        ),
        ({"label": [1, 2, 3]}, "must be a list of 2 labels"),
        ({"label": {"tone": 1, "style": 2}}, "'label' has the aspect 'style'; scale.aspects has tone, facts"),
        ({"label": [0, 0]}, "'label' of 'tone' is 0; it must be a number from 1 to 3"),
        ({"label": [4, 0]}, "'label' of 'tone' is 4; it must be a number from 1 to 3"),
        ({"label": [True, 0]}, "'label' of 'tone' is True"),
        ({"label": [1, "x"]}, "'label' of 'facts' is 'x'"),
        ({"label": [1, "nan"]}, "'label' of 'facts' is 'nan'"),
        ({"label.facts": 10}, "'label' of 'facts' is 10"),
        ({"label": [None, None]}, "no label; training and evaluation need one in every record"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"line 2: .*{message}|line 2: {message}"):
        load(tmp_path, [{"label": [1, 0]}, row])


def test_a_file_without_labels_and_a_format_without_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no record has 'label', the label's column"):
        load(tmp_path, [{"scores": [1, 2]}])
    monkeypatch.setattr(FORMATS, "_known", {known: FORMATS[known] for known in FORMATS})
    register_format("own")(read_prompt)
    with pytest.raises(ConfigError, match="scale.aspects: the format .* does not say which column holds the labels"):
        load(tmp_path, [{}], format="own")
