"""Bad data: files, rows, labels, prompts, templates; what `judge`, `evaluate` and `report` read."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.bad_inputs import JUDGE, ROWS, TRAIN, Bad, jsonl, refuses, row, table

GOOD = jsonl(ROWS)
SFT = "sft run.yaml --dry-run objective.name=raft data.max_response_tokens=64"
CSV = "id,prompt,label\n1,hello,3\n2,hi,4\n"


def parquet() -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), written)
    return written.getvalue()


def file(name: str, path: str, content: str | bytes, message: str, command: str = TRAIN) -> Bad:
    """A row that is a bad file of training data."""
    return Bad(name, message, f"{command} data.train.0.path={path}", {path: content})


def rows(name: str, content: str, message: str, command: str = TRAIN) -> Bad:
    """A row that is a bad train.jsonl. The message says its file and line."""
    return Bad(name, r"train\.jsonl" + message, command, {"train.jsonl": content})


@table(
    Bad("no such file", r"nope\.jsonl: no such file; correct", TRAIN + " data.train.0.path=nope.jsonl"),
    Bad("a pattern", r"data/\*\.jsonl: no such file \(patterns are not expanded", TRAIN + " 'data.train.0.path=data/*.jsonl'"),
    Bad("an address", r"https://x\.org/a\.jsonl: no such file \(URLs are not read", TRAIN + " data.train.0.path=https://x.org/a.jsonl"),
    Bad("a directory", r"model: a directory; name the file", TRAIN + " data.train.0.path=model"),
    Bad("a link to nothing", r"link\.jsonl: no such file", TRAIN + " data.train.0.path=link.jsonl", make=lambda: os.symlink("gone", "link.jsonl")),
    Bad("a test set is missing", r"nope\.jsonl: no such file", TRAIN + " data.eval.dev.path=nope.jsonl"),
    Bad("no data set", r"data\.train is empty: name", TRAIN + " data.train=[]"),
    rows("an empty file", "", r": no usable record; is the file complete"),
    rows("blank lines alone", "\n\n \n", r": no usable record; is the file complete"),
    Bad("gzip under another name", r"train\.jsonl: a gzip file: unpack it", files={"train.jsonl": gzip.compress(GOOD.encode())}),
    file("a name of gzip", "t.jsonl.gz", GOOD, r"t\.jsonl\.gz: unknown kind of file; use .*unpacked"),
    file("a table of Excel", "t.csv", b"PK\x03\x04abc", r"t\.csv: a zip file, or a table of Excel: .*save the table as \.csv"),
    file("Parquet under another name", "t.jsonl", parquet(), r"t\.jsonl: a Parquet file: name it \.parquet"),
    file("a pointer of Git LFS", "t.jsonl", "version https://git-lfs.github.com/spec/v1\n", r"t\.jsonl: a Git LFS pointer .*git lfs pull"),
    file("UTF-16", "t.jsonl", GOOD.encode("utf-16"), r"t\.jsonl: UTF-16 text: save"),
    Bad("Latin-1", r"train\.jsonl, line 2: not UTF-8 text \(column 36\); save", files={"train.jsonl": GOOD.encode().replace(b"answer 1", b"caf\xe9")}),
    rows("NUL bytes behind a crash", GOOD + "\0" * 9, r", line 7: NUL bytes \(column 1\): the file is damaged; write it again"),
    rows("half of a character", GOOD.replace("answer 1", r"\ud800"), r", line 2: 'prompt' holds the lone surrogate .*correct the text"),
    rows("a line cut short", GOOD[:-20], r", line 6: not valid JSON .*write one object a line"),
    rows("an object of many lines", json.dumps(ROWS[0], indent=1), r", line 1: not valid JSON .*write one object a line"),
    rows("commas behind lines", GOOD.replace("}\n", "},\n"), r", line 1: not valid JSON \(Extra data.*write one object a line"),
    rows("a number in place of a row", GOOD + "3\n", r", line 7: 3 is no object; each record is one JSON object"),
    rows("a key twice", '{"prompt": "a", "label": 1, "label": 5}\n', r", line 1: 'label' is there twice in one object; keep one"),
    rows("nested too deeply", GOOD + '{"a":' * 9999 + "1" + "}" * 9999 + "\n", r", line 7: nested too deeply; flatten"),
    file("a list cut short", "t.json", json.dumps(ROWS)[:-9], r"t\.json, line 1, column \d+: not valid JSON .*is the file complete"),
    file("a list inside of an object", "t.json", json.dumps({"data": ROWS}), r"t\.json: no record has 'label'.*\(its columns are 'data'\)"),
    file("a short line", "t.csv", CSV + "3,a\n", r"t\.csv, line 4: 2 cells for 3 columns \(id, prompt, label\)"),
    file("semicolons", "t.csv", CSV.replace(",", ";"), r"t\.csv: no record has 'label'.*\(its columns are 'id;prompt;label'\)"),
    file("commas in a .tsv", "t.tsv", CSV, r"t\.tsv: no record has 'label'.*\(its columns are 'id,prompt,label'\)"),
    file("no names of columns", "t.csv", CSV[16:], r"t\.csv: no record has 'label'.*\(its columns are '1', 'hello', '3'\)"),
    file("a column twice", "t.csv", "prompt,prompt,label\na,b,3\n", r"t\.csv, line 1: the column 'prompt' is named twice"),
    file("quotes that stay open", "t.csv", 'prompt,label\n"abc,3\n', r"t\.csv, line 2: unexpected end of data; put a cell"),
    file("NUL in a cell", "t.csv", "prompt,label\na\0b,3\n", r"t\.csv, line 2: NUL bytes \(column 2\)"),
    file("Parquet cut short", "t.parquet", parquet()[:-50], r"t\.parquet: not readable as Parquet: .*; write the file again"),
    file("text as Parquet", "t.parquet", GOOD, r"t\.parquet: not readable as Parquet: .*; write the file again"),
)  # fmt: skip
def test_a_bad_file_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


LABEL = '"label": 2'
NUMBER = "it must be a finite number, or a list of them"


@table(
    rows("a label beyond the scale", row(label=7), r", line 2: label 7 is outside of the score scale \[1, 5\]; correct"),
    rows("a label in words", row(label="good"), r", line 2: 'label' is 'good'; " + NUMBER),
    rows("a label of two numbers", row(label="3/5"), r", line 2: 'label' is '3/5'; " + NUMBER),
    rows("a label with an underscore", row(label="1_0"), r", line 2: 'label' is '1_0'; " + NUMBER),
    rows("a true label", row(label=True), r", line 2: 'label' is True; " + NUMBER),
    rows("a label that is no number", GOOD.replace(LABEL, '"label": NaN'), r", line 2: 'label' is nan; " + NUMBER),
    rows("an infinite label", GOOD.replace(LABEL, '"label": 1e999'), r", line 2: 'label' is inf; " + NUMBER),
    rows("a label of 5000 digits", GOOD.replace(LABEL, LABEL + "0" * 5000), r", line 2: a whole number has more than 4300 digits"),
    rows("a null label", GOOD.replace(LABEL, '"label": null'), r", line 2: no label; training and evaluation need one"),
    rows("no label in a row", row(label=None), r", line 2: no label; training and evaluation need one"),
    rows("no label in any row", jsonl([{"prompt": "a"}]), r": no record has 'label', .*name one of them in data\.\*\.score"),
    Bad("a column of labels that is not there", r"train\.jsonl: no record has 'points', .*numbers: label; name one", TRAIN + " data.train.0.score=points"),
    Bad("a word without its number", r"train\.jsonl, line 1: the label '1' has no number in data\.\*\.labels .*add it", TRAIN + " 'data.train.0.labels={good: 5}'"),
    rows("no prompt", row(prompt=None), r", line 2: template 'plain' needs 'prompt', the record has .*cot, id, label; choose"),
    rows("a list of prompts", row(prompt=["a"]), r", line 2: template 'plain' needs 'prompt'"),
    rows("a blank prompt", row(prompt=" \n"), r", line 2: the prompt is empty; give it a text"),
    rows("messages that are a text", row(messages="hi"), r", line 2: 'messages' must be a list of objects with 'role'"),
    rows("messages of ShareGPT", row(messages=[{"from": "human", "value": "x"}]), r", line 2: a message is .*; each needs the texts 'role'"),
    rows("messages with pictures", row(messages=[{"role": "user", "content": [{"type": "text"}]}]), r", line 2: a message is .*; each needs"),
    Bad("a role that the template refuses", r"example row 1: the tokenizer's chat template refuses messages of the roles judge: who\?; use other roles",
        files={"train.jsonl": row(messages=[{"role": "judge", "content": "x"}])},
        make=lambda: Path("model/chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('who?') }}{% endfor %}")),
    rows("an id twice", row(id="row 0"), r", line 2: id 'row 0' was given before, in train\.jsonl, line 1; make ids unique"),
    rows("an id that another row gets", jsonl([{"id": "train-2", "prompt": "a", "label": 1}, {"prompt": "b", "label": 1}]), r", line 2: id 'train-2' was given before"),
    Bad("all prompts too long", r"no training example is left: raise data\.max_prompt_tokens", TRAIN + " data.max_prompt_tokens=3"),
    rows("no critique", row(cot=None), r": example row 1 has no critique: .*add it, or set sft\.cots", SFT),
    rows("a critique that is a number", row(cot=3), r", line 2: the critique is 3; it must be a text", SFT),
    Bad("critiques that say the label", r"train\.jsonl: 50 of 50 critiques say the label .*; set critique_end", SFT, {"train.jsonl": jsonl(
        [{"prompt": f"p{i}", "label": 1 + i % 5, "cot": f"The answer is worth {1 + i % 5} points. Thanks."} for i in range(50)])}),
    Bad("fields of a template", r"train\.jsonl, line 1: template 'prometheus' needs 'orig_instruction', .*; choose another data\.template", TRAIN + " data.template=prometheus"),
    Bad("a template without a place", r"data\.template: t\.txt: no placeholder", TRAIN + " data.template=t.txt", {"t.txt": "Rate this"}),
    Bad("a template in Latin-1", r"data\.template: t\.txt: not UTF-8 text .*; save", TRAIN + " data.template=t.txt", {"t.txt": b"caf\xe9 {prompt}"}),
    Bad("another format", r"train\.jsonl: no record has 'orig_score', .*name one of them", TRAIN + " data.train.0.format=feedback_collection"),
    Bad("a column under our name that is not there", r"train\.jsonl: data\.\*\.columns takes 'prompt' from the column 'question', .*the columns are id, prompt", TRAIN + " 'data.train.0.columns={prompt: question}'"),
    Bad("clusters by a column that is not there", r"train\.jsonl, line 1: no value in the column 'question', .*name another", TRAIN + " data.eval.dev.path=train.jsonl data.eval.dev.cluster=question"),
)  # fmt: skip
def test_a_bad_row_is_one_message(row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


BEGUN = {"out.jsonl": '{"id": "row 0", "row": "x"}\n'}


@table(
    Bad("no input", r"nope\.jsonl: the input cannot be read \(No such file", JUDGE.replace("train.jsonl", "nope.jsonl")),
    Bad("an input that is a directory", r"model: the input cannot be read \(Is a directory", JUDGE.replace("train.jsonl", "model")),
    Bad("an empty input", r"train\.jsonl: the input has no rows", JUDGE, {"train.jsonl": "\n"}),
    Bad("an input that is no JSONL", r"t\.csv: no row could be judged, see out\.jsonl\.errors\.jsonl: .*JSONL", JUDGE.replace("train.jsonl", "t.csv"), {"t.csv": CSV}, mended=False),
    Bad("the input as output", r"--output: train\.jsonl is the input: name another", JUDGE.replace("out.jsonl", "train.jsonl")),
    Bad("an output that is a directory", r"output: model is a directory", JUDGE.replace("out.jsonl", "model")),
    Bad("a field that rows have themselves", r"keep_fields: 'score' is a field of the output row itself; give", JUDGE + " --keep-fields score"),
    Bad("another job's output", r"out\.jsonl exists, but out\.jsonl\.job\.json does not, .*choose another", JUDGE, BEGUN),
    Bad("settings of a job that are damaged", r"out\.jsonl\.job\.json is damaged, .*choose another output, or remove both", JUDGE, {**BEGUN, "out.jsonl.job.json": "{"}),
    Bad("settings of a job that are a list", r"out\.jsonl\.job\.json is damaged, .*choose another output, or remove both", JUDGE, {**BEGUN, "out.jsonl.job.json": "[1]"}),
    Bad("a report of nothing", r"model: neither metrics\.jsonl nor evaluation/\*\.json is there", "report model"),
    Bad("metrics that are no text", r"out/metrics\.jsonl, line 1: not a row of metrics .*remove the line", "report out", {"out/metrics.jsonl": b"\xe9\n"}),
    Bad("an evaluation cut short", r"out/evaluation/dev\.json: not a saved evaluation .*evaluate again", "report out", {"out/evaluation/dev.json": "{"}),
)  # fmt: skip
def test_a_bad_file_of_other_commands_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)
