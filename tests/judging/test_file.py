"""The streaming judge: output rows, bad rows, kills at any byte, other settings."""

import errno
import json
import math

import pytest

from real_megatron.errors import ConfigError, EngineError
from real_megatron.judging import file
from real_megatron.judging.evaluate import EvaluationPrompt, evaluate_set
from real_megatron.judging.file import RESULT, errors_path, judge_file
from real_megatron.judging.job import job_path
from real_megatron.rollout.engine import SamplingParams
from tests.support.judges import make_judge

PARAMS = SamplingParams(n=1, max_new_tokens=12)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"id": f"r{i}", "prompt": f"{1 + i % 3} {'a ' * (i + 1)}b"} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(engine, tokenizer, scale, source, tmp_path):
    def call(output=tmp_path / "out.jsonl", engine=engine, params=PARAMS, on_progress=None, keep=(), **options):
        judge = make_judge(engine, tokenizer, scale, params, **{"batch": 3} | options)
        return judge_file(judge, source, output, on_progress, keep)

    return call


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_say_what_evaluation_says(run, engine, tokenizer, scale, source, tmp_path) -> None:
    seen = []
    output = tmp_path / "out.jsonl"
    summary = run(seed=4, on_progress=lambda s: seen.append((s.judged, len(read_rows(output)))))
    assert (summary.judged, summary.skipped, summary.bad) == (7, 0, 0)
    assert seen == [(3, 3), (6, 6), (7, 7)]  # what is reported as judged is in the file
    rows = read_rows(tmp_path / "out.jsonl")
    examples = [
        EvaluationPrompt(id=r["id"], label=3.0, prompt_ids=tokenizer.encode(r["prompt"])) for r in read_rows(source)
    ]
    judge = make_judge(engine, tokenizer, scale, PARAMS, seed=4, bootstrap=1)
    expected = evaluate_set(judge, examples, "x").predictions
    for row, prediction in zip(rows, expected, strict=True):
        assert list(row) == ["id", *RESULT, "row"]
        assert row["id"] == prediction.id and row["critique"] == prediction.critiques[0]
        assert row["sampled_score"] == prediction.sampled
        assert list(row["distribution"]) == scale.texts
        # Batches of other sizes: float32 logits differ in the last bits.
        assert list(row["distribution"].values()) == pytest.approx(prediction.probabilities, rel=1e-4)
        assert row["score"] == pytest.approx(
            sum(row["distribution"][t] * v for t, v in zip(scale.texts, scale.values, strict=True))
        )
    assert summary.no_anchor == sum(row["no_anchor"] for row in rows)
    assert summary.truncated == sum(row["truncated"] for row in rows) > 0
    assert not errors_path(tmp_path / "out.jsonl").exists()


def test_several_critiques_are_listed_and_averaged(run, tmp_path) -> None:
    run(params=SamplingParams(n=3, max_new_tokens=12))
    for row in read_rows(tmp_path / "out.jsonl"):
        assert len(row["samples"]) == 3 and list(row) == ["id", *RESULT, "samples", "row"]
        assert all(list(sample) == [*RESULT] for sample in row["samples"])
        for key in ("critique", "no_anchor", "truncated"):
            assert row[key] == row["samples"][0][key]
        for key in ("score", "score_renormalized", "score_mass", "sampled_score"):
            assert row[key] == pytest.approx(sum(s[key] for s in row["samples"]) / 3)


@pytest.mark.parametrize("mode", ["full", "renormalized"])
def test_a_row_explains_its_score(mode: str, run, scale, tmp_path) -> None:
    """A random model puts most of the probability beside the scale: its full expectation is below 1."""
    run(probabilities=mode)
    for row in read_rows(tmp_path / "out.jsonl"):
        p = row["distribution"]
        full = sum(p[t] * v for t, v in zip(scale.texts, scale.values, strict=True))
        assert row["score_mass"] == pytest.approx(sum(p.values())) and 0 < row["score_mass"] < 0.9
        assert row["score_renormalized"] == pytest.approx(full / row["score_mass"]) and full < 3
        assert 1 <= row["score_renormalized"] <= 3
        assert row["score"] == pytest.approx({"full": full, "renormalized": row["score_renormalized"]}[mode])


def test_fields_of_the_input_reach_the_output_on_request(run, source, tmp_path) -> None:
    kept = [{"source": {"file": "ä", "page": i}, "label": None, "id": i} for i in range(3)]
    lines = [json.dumps({"prompt": "start", "more": 1} | row) for row in kept]
    lines += [
        '{"prompt": "start", "id": "a", "label": 3}',
        '{"prompt": "start", "id": "b", "label": [NaN], "source": 1}',
    ]
    source.write_text("\n".join(lines) + "\n")
    output = tmp_path / "out.jsonl"
    summary = run(keep=["source", "id", "label"])
    rows = read_rows(output)
    assert (summary.judged, summary.bad) == (3, 2)
    assert [list(row) for row in rows] == [["id", "source", "label", *RESULT, "row"]] * 3
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert [(row["source"], row["label"]) for row in rows] == [(row["source"], row["label"]) for row in kept]
    assert [row["error"] for row in read_rows(errors_path(output))] == [
        "no field 'source', which keep_fields names; the fields are prompt, id, label",
        "'label', which keep_fields names, holds NaN or Infinity, which are no JSON",
    ]
    before = output.read_bytes()
    for other in ([], ["source"], ["label", "source"]):
        with pytest.raises(ConfigError, match=r"begun with other settings \(fields was"):
            run(keep=other)
    for own in ("score", "row", "samples"):
        with pytest.raises(ConfigError, match=f"'{own}' is a field of the output row itself"):
            run(keep=[own])
    assert output.read_bytes() == before


def test_rows_of_a_version_with_other_fields_are_not_continued(run, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    run()
    settings = json.loads(job_path(output).read_text())
    assert settings.pop("fields") == [*RESULT]
    job_path(output).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="fields was None, is"):
        run()


def test_two_jobs_into_one_output_are_one_too_many(run, engine, tmp_path) -> None:
    output, refused = tmp_path / "out.jsonl", []

    class Interrupted:
        def generate(self, *args):
            for other in (output, tmp_path / "other.jsonl"):
                try:
                    run(other)
                except ConfigError as error:
                    refused.append(str(error))
            return engine.generate(*args)

        def branch_logprobs(self, *args):
            return engine.branch_logprobs(*args)

    assert run(engine=Interrupted()).judged == 7
    assert len(refused) == 3 and all(f"{output} is being written by another job" in text for text in refused)
    for path in (output, tmp_path / "other.jsonl"):
        assert [row["id"] for row in read_rows(path)] == [f"r{i}" for i in range(7)]
    assert not list(tmp_path.glob(".*"))


def test_rows_that_two_jobs_have_left_twice_are_removed_and_counted(run, tmp_path, caplog) -> None:
    """As the versions before the lock left them."""
    output = tmp_path / "out.jsonl"
    run()
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    again = json.loads(lines[1]) | {"critique": "of the second job"}
    output.write_bytes(b"".join([*lines[:4], lines[0], json.dumps(again).encode() + b"\n", *lines[4:], b'{"id": "r']))
    summary = run()
    assert (summary.judged, summary.skipped, summary.repeated) == (0, 7, 2) and output.read_bytes() == whole
    assert "removed 2 rows whose id stood there before" in caplog.text and "the first: line 5" in caplog.text
    assert run().repeated == 0 and {p.name for p in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.jsonl",
        job_path(output).name,
    }


def test_bad_rows_are_reported_and_tried_again(run, source, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    good = source.read_text()
    bad = [
        "{not json",
        "[1, 2]",
        '{"id": "no prompt"}',
        '{"id": "list", "prompt": ["start"]}',
        '{"id": "r0", "prompt": "start"}',
        json.dumps({"id": "long", "prompt": "a " * 300}),
        '{"prompt": "start 1 critique:"}',
        '{"id": "\\ud800", "prompt": "start"}',
        "[" * 100_000,
        '{"prompt": "start", "n": ' + "1" * 5000 + "}",
        '{"prompt": "start", "n": ' + "[" * 900 + "]" * 900 + "}",
    ]
    source.write_bytes((good + "\n".join(bad) + "\n").encode() + b'{"id": "latin", "prompt": "\xe9"}\n')
    summary = run()
    errors = {row["line"]: row["error"] for row in read_rows(errors_path(output))}
    assert sorted(errors) == [8, 9, 10, 11, 12, 13, *range(15, 20)]
    for line, text in {
        8: "not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        9: "[1, 2] is no object",
        10: "needs 'prompt'",
        11: "needs 'prompt', the record has the text fields: id",
        12: "'r0' occurs in an earlier row",
        13: "exceeds the model's 256 positions",
        15: "'id' holds the lone surrogate",
        16: "nested too deeply",
        17: "a whole number has more than 4300 digits",
        18: "nested too deeply, beyond 100 levels",
        19: "not UTF-8",
    }.items():
        assert text in errors[line], line
    assert [row["id"] for row in read_rows(output)] == [*(f"r{i}" for i in range(7)), "line 14"]
    assert (summary.judged, summary.bad) == (8, 11)
    source.write_text(good + json.dumps({"id": "long", "prompt": "note"}) + "\n")
    fixed = run()
    assert (fixed.judged, fixed.skipped, fixed.bad) == (1, 7, 0) and not errors_path(output).exists()


def test_labels_and_critiques_of_the_rows_mean_nothing(run, source, tmp_path) -> None:
    """Whatever columns of these names hold: rows to judge have no label yet, or that of another question."""
    held = [None, 7, -1e9, "good", [], [1e308, 1e308], {"a": 1}, True, int("1" * 400), ["a", 2]]
    rows = [{"prompt": "start"} | {key: value} for value in held for key in ("label", "cot")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(params=SamplingParams(n=1, max_new_tokens=1), batch=20)
    assert (summary.judged, summary.bad) == (20, 0)


def test_a_job_killed_at_any_byte_ends_with_the_same_rows(run, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    run(output)
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in (0, 1, ends[0] - 1, ends[0], ends[2] + 5, len(whole) - 1):
        output.write_bytes(whole[:size])
        summary = run(output)
        complete = sum(end <= size for end in ends)
        assert (summary.skipped, summary.judged) == (complete, 7 - complete)
        rows, expected = read_rows(output), [json.loads(line) for line in whole.splitlines()]
        assert [r["id"] for r in rows] == [r["id"] for r in expected]
        assert [r["critique"] for r in rows] == [r["critique"] for r in expected]
        # Resumed batches hold other rows: float32 logits differ in the last bits.
        assert [r["score"] for r in rows] == pytest.approx([r["score"] for r in expected], rel=1e-4)


def test_what_was_judged_before_the_engine_failed_is_kept(run, engine, tmp_path) -> None:
    class Failing:
        calls = 0

        def generate(self, *args):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the server is gone")
            return engine.generate(*args)

        def branch_logprobs(self, *args):
            return engine.branch_logprobs(*args)

    with pytest.raises(RuntimeError, match="the server is gone"):
        run(engine=Failing())
    assert len(read_rows(tmp_path / "out.jsonl")) == 6
    assert (run().judged, len(read_rows(tmp_path / "out.jsonl"))) == (1, 7)


class WithoutNumbers:
    """An engine whose model is damaged: every score log-prob is NaN, or only those of the prompt `damaged`."""

    def __init__(self, engine, damaged=None):
        self.engine, self.damaged, self.calls = engine, damaged, 0

    def generate(self, prompts, params, seeds):
        self.calls += 1
        groups = self.engine.generate(prompts, params, seeds)
        for prompt, group in zip(prompts, groups, strict=True):
            for response in group if self.damaged in (None, prompt) else []:
                response.watched = [[math.nan] * len(row) for row in response.watched]
        return groups

    def branch_logprobs(self, sequences, branches):
        found = self.engine.branch_logprobs(sequences, branches)
        found[[self.damaged in (None, ids[: len(self.damaged or [])]) for ids in sequences]] = math.nan
        return found


def test_a_model_that_cannot_score_stops_the_job_at_once(run, engine, source, tmp_path) -> None:
    source.write_text("".join(json.dumps({"prompt": f"{i % 3 + 1} {'a ' * (i % 9)}b"}) + "\n" for i in range(64)))
    broken = WithoutNumbers(engine)
    with pytest.raises(EngineError, match="score log-probs are NaN: its weights are damaged, or overflow"):
        run(engine=broken, batch=64)
    assert broken.calls == 1 and (tmp_path / "out.jsonl").read_bytes() == b""


def test_one_prompt_that_has_no_scores_stops_the_job_and_keeps_what_was_judged(run, engine, tokenizer, tmp_path):
    """JSON has no NaN, and no score is no score."""
    with pytest.raises(EngineError, match="score log-probs are NaN"):
        run(engine=WithoutNumbers(engine, tokenizer.encode("2 a a a a a b")))
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == ["r0", "r1", "r2"]
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_bugs_are_not_taken_for_bad_rows(run, engine) -> None:
    class Buggy(WithoutNumbers):
        def generate(self, prompts, params, seeds):
            return json.loads("{broken")

    with pytest.raises(json.JSONDecodeError):
        run(engine=Buggy(engine))


def test_a_refused_prompt_is_one_bad_row_and_the_others_are_asked_once_more(run, engine, source, tmp_path) -> None:
    asked = []

    class Refusing(WithoutNumbers):
        def generate(self, prompts, params, seeds):
            asked.append(len(prompts))
            return self.engine.generate(prompts, params, seeds)

        branch_logprobs = property(lambda self: self.engine.branch_logprobs)

    rows = [{"id": f"r{i}", "prompt": "a " * (300 if i in (1, 5) else i + 1)} for i in range(7)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(engine=Refusing(engine), batch=7)
    assert (summary.judged, summary.bad, asked) == (5, 2, [7, 6, 5])
    errors = read_rows(errors_path(tmp_path / "out.jsonl"))
    assert [(e["line"], e["id"]) for e in errors] == [(2, "r1"), (6, "r5")]
    assert all("exceeds the model's 256 positions" in e["error"] for e in errors)


def test_a_job_is_not_resumed_with_other_settings(run, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    run(name="a")
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="model was 'a', is 'b'"):
        run(name="b")
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        run(name="a", seed=1)
    # Nor where the job's settings do not say all: an older version had written them.
    job = json.loads(job_path(output).read_text())
    job_path(output).write_text(json.dumps({key: value for key, value in job.items() if key != "seed"}))
    with pytest.raises(ConfigError, match="seed was None, is 0"):
        run(name="a")
    job_path(output).unlink()
    with pytest.raises(ConfigError, match="cannot be resumed"):
        run(name="a")
    assert output.read_bytes() == before


def test_rows_of_another_input_are_not_taken_for_judged(run, source, tmp_path) -> None:
    """Rows without an id are known by their line, which says nothing about another file or an edited one."""
    output, prompts = tmp_path / "out.jsonl", ["start", "start a", "start b"]
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    run()
    before = output.read_bytes()
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ["new", *prompts]))
    summary = run()
    assert (summary.judged, summary.skipped, summary.bad) == (1, 0, 3) and output.read_bytes().startswith(before)
    assert "read differently when it was judged" in read_rows(errors_path(output))[0]["error"]
    source.rename(tmp_path / "other.jsonl")
    source.symlink_to(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=r"input was '.*in\.jsonl', is '.*other\.jsonl'"):
        run()


def test_windows_files_and_empty_ones(run, source, tmp_path) -> None:
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "start"}\r\n\r\n{"prompt": "start a"}\r\n')
    assert (run().judged, [row["id"] for row in read_rows(tmp_path / "out.jsonl")]) == (2, ["line 1", "line 3"])
    source.write_bytes(b"")
    summary = run(tmp_path / "empty.jsonl")
    assert (summary.judged, summary.bad, (tmp_path / "empty.jsonl").read_bytes()) == (0, 0, b"")


def test_an_output_of_something_else_is_refused(run, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    run()
    output.write_text('{"score": 1}\n')
    with pytest.raises(ConfigError, match="line 1: not a row of this job"):
        run()


def test_long_prompts_are_cut_and_counted(run, tmp_path) -> None:
    """Rows have 3 to 9 tokens."""
    summary = run(max_prompt_tokens=4, long_prompts="cut_left")
    assert (summary.judged, summary.bad, summary.cut) == (7, 0, 5)
    with pytest.raises(ConfigError, match="cut_left_to was 4, is 5"):
        run(max_prompt_tokens=5, long_prompts="cut_left")
    dropped = run(tmp_path / "dropped.jsonl", max_prompt_tokens=4)
    assert (dropped.judged, dropped.bad, dropped.cut) == (2, 5, 0)


def test_a_disk_that_is_full_is_one_line_that_names_the_output(run, tmp_path, monkeypatch) -> None:
    """As it meets a write; the rows before it stay, and the job goes on behind them."""
    real, written = file.append, []

    def full(handle: int, data: bytes) -> None:
        written.append(data)
        if len(written) == 3:
            real(handle, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(file, "append", full)
        with pytest.raises(OSError, match=r"out.jsonl: cannot be written \(No space left .*: make room there, and run"):
            run()
    assert len(read_rows_before(tmp_path / "out.jsonl")) == 2
    run()
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == [f"r{i}" for i in range(7)]


def read_rows_before(path) -> list[str]:
    """Whole lines of a file whose last one is cut short."""
    return path.read_text().split("\n")[:-1]
