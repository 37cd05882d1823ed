"""Bad configurations: YAML files, overrides, values and combinations."""

from pathlib import Path

import pytest

from tests.support.bad_inputs import RUN, TRAIN, Bad, refuses, table

FILE = r"run\.yaml"


def given(name: str, override: str, message: str, command: str = TRAIN) -> Bad:
    """A row that is a bad override. The message names it first."""
    return Bad(name, message, f"{command} {override}")


@table(
    Bad("an empty file", r"model\.path is not set: name", files={"run.yaml": ""}),
    Bad("a byte order mark is none of the text", FILE + r":8: unknown key `stepz`; did you mean `steps`\?", files={
        "run.yaml": b"\xef\xbb\xbf" + RUN.encode() + b"stepz: 1\n"}),
    Bad("UTF-16", FILE + r":1: .* not UTF-8 text; save", files={"run.yaml": RUN.encode("utf-16")}),
    Bad("Latin-1", FILE + r":8: .* not UTF-8 text; save", files={"run.yaml": RUN.encode() + b"# caf\xe9\n"}),
    Bad("a NUL byte", FILE + r": not valid YAML: .*; remove it", files={"run.yaml": RUN + "\0"}),
    Bad("a tab", FILE + r":3: not valid YAML: .*; indent with spaces", files={
        "run.yaml": "output: out\nmodel:\n\tpath: model\n"}),
    Bad("a key twice", FILE + r":8: `steps` is set twice \(first on line 2\); keep", files={
        "run.yaml": RUN + "steps: 3\n"}),
    Bad("a merged section", FILE + r":\d: unknown key `model\.paht`; did you mean `model\.path`", files={
        "run.yaml": "base: &b {path: model}\n" + RUN.replace("{path: model}", "{<<: *b, paht: x}")}),
    Bad("an anchor that is not there", FILE + r":3: not valid YAML: found undefined alias 'm'; put .* in quotes", files={
        "run.yaml": RUN.replace("path: model}", "path: *m}")}),
    Bad("a list in place of a section", FILE + r":3: `model`: must be `key: value` lines", files={
        "run.yaml": RUN.replace("{path: model}", "[path, model]")}),
    Bad("a section without keys", FILE + r":8: `optimizer`: must be `key: value` lines .*remove it", files={
        "run.yaml": RUN + "optimizer:\n"}),
    Bad("a section in place of a list", FILE + r":6: `data\.train`: must be a list", files={
        "run.yaml": RUN.replace("[{path: train.jsonl}]", "{path: train.jsonl}")}),
    Bad("a text in place of a data set", FILE + r":6: `data\.train\.0`: must be `key: value` lines", files={
        "run.yaml": RUN.replace("[{path: train.jsonl}]", "[train.jsonl]")}),
    Bad("two documents", FILE + r":8: not valid YAML: .*; remove the line ---", files={
        "run.yaml": RUN + "---\nsteps: 3\n"}),
    Bad("a list", FILE + r": the file must hold `key: value` lines, not a list", files={"run.yaml": "[1, 2]"}),
    Bad("a tag of Python", FILE + r":8: not valid YAML: .*; tags are not read", files={
        "run.yaml": RUN + "seed: !!python/object/apply:os.system ['touch x']\n"}),
    Bad("a key that is a list", FILE + r":8: not valid YAML: .*; a key must be one word", files={
        "run.yaml": RUN + "? [1, 2]\n: 3\n"}),
    Bad("a key that is a number", FILE + r":8: unknown key `scale\.1`: .*scores", files={
        "run.yaml": RUN + "scale: {1: 2}\n"}),
    Bad("a date that is none", FILE + r": not valid YAML: month .*; put a text in quotes", files={
        "run.yaml": RUN + "seed: 2024-99-01\n"}),
    Bad("a number of 5000 digits", FILE + r":8: not valid YAML: a number of 5001 digits", files={
        "run.yaml": RUN + "seed: 1" + "0" * 5000 + "\n"}),
    Bad("nested too deeply", FILE + r": nested too deeply", files={
        "run.yaml": RUN + "seed: " + "[" * 3000 + "]" * 3000 + "\n"}),
    Bad("half of a character", FILE + r":9: data\.template: .*'\\ud800'.*; remove it", files={
        "run.yaml": RUN + '\n  template: "\\ud800"\n'}),
    Bad("a path with NUL", FILE + r":1: output: .*'\\x00'.*; remove it", files={
        "run.yaml": RUN.replace("output: out", r'output: "a\0b"')}),
    Bad("no such file", r"nope\.yaml: cannot read .*No such file.*; name the YAML file", "train nope.yaml"),
    Bad("a directory", r"model: cannot read .*Is a directory.*; name the YAML file", "train model"),
    Bad("an override in place of the file", r"steps=3: cannot read .*; name the YAML file", "train steps=3 run.yaml"),
)  # fmt: skip
def test_a_bad_file_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


@table(
    given("no =", "optimizer.lr", r"override `optimizer\.lr`: write it as key=value"),
    given("nothing before =", "=3", r"override `=3`: write it as key=value"),
    given("nothing behind =", "optimizer.lr=", r"override `optimizer\.lr=`: `optimizer\.lr`: .*number.*\(got ''\)"),
    given("two =", "optimizer.lr=1=2", r"override `optimizer\.lr=1=2`: `optimizer\.lr`: .*number.*\(got '1=2'\)"),
    given("a key without a name", "optimizer..lr=1", r"override `optimizer\.\.lr=1`: write it as key=value"),
    given("a key below a value", "steps.x=1", r"override `steps\.x=1`: `steps` is a value"),
    given("a misspelt key", "optimizer.lrr=1", r"override .*: unknown key `optimizer\.lrr`; did you mean `optimizer\.lr`"),
    given("a key of another section", "model.lr=1", r"override .*unknown key `model\.lr`; did you mean `optimizer\.lr`"),
    given("a list without its number", "data.train.path=x", r"override .*`data\.train` is a list of 1 .*`path` must be"),
    given("a new item lacks a key", "data.train.1.limit=3", r"override `data\.train\.1\.limit=3`: `data\.train\.1\.path`"),
    given("a pattern", "'data.train.0.path=*.jsonl'", r"override .*not valid YAML: .*alias.*; put .* in quotes"),
    given("brackets that stay open", "'scale.scores=[1, 2'", r"override `scale\.scores=\[1, 2`: not valid YAML: .*brackets"),
    given("a key twice", "'data.train=[{path: a, path: b}]'", r"override .*: `0\.path` is set twice; keep one"),
    given("nested too deeply", "seed=" + "[" * 2000, r"override .*: nested too deeply"),
    given("a tag", "'seed=!!python/name:os.system'", r"override .*not valid YAML.*; tags are not read"),
    given("not a number", "optimizer.lr=.nan", r"override .*: `optimizer\.lr`: .*finite number \(got nan\)"),
    given("infinite", "optimizer.lr=1e400", r"override .*: `optimizer\.lr`: .*finite number"),
    given("half a step", "steps=2.5", r"override `steps=2\.5`: `steps`: .*integer.* \(got 2\.5\)"),
    given("true for a number", "steps=true", r"override `steps=true`: steps: a number is needed, not true"),
    given("yes for a choice", "rollout.staleness=yes", r"override .*: rollout\.staleness: a number is needed, not true"),
    given("a true value", "'scale.values=[true, 2, 3, 4, 5]'", r"override .*: scale\.values: a number is needed, not true"),
    given("a leading zero", "steps=010", r"override `steps=010`: not valid YAML: 010 .*leading zeros"),
    given("a time of day", "steps=1:30", r"override `steps=1:30`: not valid YAML: 1:30 .*in quotes"),
    given("a huge number", "steps=1" + "0" * 30, r"override .*: steps: a number of 31 digits; at most 2147483647"),
    given("a huge limit", "data.train.0.limit=1" + "0" * 30, r"override .*data\.train\.0\.limit: a number of 31 digits"),
    given("a huge batch", "batch.prompts=1000000000", r"override .*: `batch\.prompts`: .*less than or equal to 1000000"),
    given("a huge group", "rollout.n=1000000000", r"override .*: `rollout\.n`: .*less than or equal to 10000"),
    given("an eternal timeout", "parallel.timeout_minutes=1000000000", r"override .*timeout_minutes`: .*equal to 525600"),
    given("padding without end", "model.vocab_multiple=1000000000", r"override .*vocab_multiple`: .*equal to 65536"),
    given("a variable", "'output=$SCRATCH/out'", r"override .*: output: \$SCRATCH/out: .*variables are not replaced.*write"),
    given("a home directory", "'output=~/out'", r"override .*: output: ~/out: `~` .*not replaced.*write the directory out"),
    given("no output", "output=", r"override `output=`: output: is empty: name a directory"),
    given("the output is a file", "output=train.jsonl", r"output: train\.jsonl cannot be a directory, .* choose another"),
    given("another spelling", "objective.name=REAL", r"override .*: `objective\.name`: .*'real', 'rloo'.*\(got 'REAL'\)"),
    given("a list of a list", "'data.chat_template_args={a: [1]}'",
          r"override .*: `data\.chat_template_args\.a`: must be true or false, a number or a text \(got \[1\]\)$"),
    given("a name of results that is a path", "data.eval.a/b.path=train.jsonl", r"override .*eval: 'a/b' names files of"),
    given("a name of results that is too long", f"data.eval.{'x' * 300}.path=train.jsonl", r"override .*100 of them at most"),
    given("a template that is a text", "'data.template=Rate {prompt} now'", r"data\.template: 'Rate \{prompt\} now' is neither"),
    given("a template of endless name", "data.template=" + "x" * 300, r"data\.template: 'x+' is neither"),
    given("colocated and stale", "rollout.colocate=true rollout.staleness=1", r"override .*colocate: .*switch one of them off"),
    given("fewer prompts than updates", "batch.mini_batches=3", r"run\.yaml: batch\.mini_batches is 3 for batch\.prompts 2"),
    given("KL without rollouts", "objective.name=raft objective.kl=1", r"run\.yaml: objective\.kl: raft has no KL term, set",
          "sft run.yaml --dry-run"),
    given("an empty model", "model.path=", r"model\.path is not set: name the Hugging Face checkpoint"),
    given("an unknown reward", "objective.reward=real2", r"objective\.reward: unknown reward 'real2'; known: .*module:name"),
    given("a reward that is none", "objective.reward=os:system", r"objective\.reward: 'os:system' is .* not a Reward; register"),
    given("an unknown format", "data.train.0.format=csv", r"data\.\*\.format: unknown record format 'csv'; known: "),
    given("no regular expression", "data.train.0.critique_end='('", r"override .*data\.train\.0\.critique_end: '\(' is no"),
    given("a kind of placement", "--rollout both", r"--rollout both: choose one of auto, colocated", "plan --model model --gpus 8"),
    given("the plan's file exists", "--output run.yaml", r"--output: run\.yaml exists: name another", "plan --model model --gpus 8"),
    given("files of no size", "--max-file-gb nan", r"--max-file-gb nan: give a positive number", "convert to-hf model out"),
)  # fmt: skip
def test_a_bad_value_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)
