import pytest

from real_megatron.data.formats import BadRecord, read_evaluation, read_feedback, read_jsonl, sections
from real_megatron.data.template import load_template

PARTS = {
    "orig_instruction": "Judge this:\n\n###Response to evaluate:\nhi\n\n###Score Rubrics:\nnone",
    "orig_response": 'A {prompt} with "quotes" and\n\ntwo paragraphs.',
    "orig_reference_answer": "It.",
    "orig_criteria": "Is it [really] good?",
    **{f"orig_score{k}_description": f"It is {k} good: Score." for k in range(1, 6)},
}
PROMPT = load_template("prometheus").render(PARTS)


def test_sections_undo_the_prometheus_template() -> None:
    """Also where the instruction itself holds a judge's prompt with the same headings."""
    found = sections(PROMPT)
    assert {name: found[name] for name in PARTS} == PARTS


def test_sections_of_other_prompts_are_only_those_found() -> None:
    without = PROMPT.replace("###Reference Answer (Score 5):\nIt.\n\n", "")
    found = sections(without)
    assert "orig_reference_answer" not in found
    assert found["orig_response"] == PARTS["orig_response"]
    assert sections("What is 2 + 2?") == {}
    assert "orig_criteria" not in sections("###Score Rubrics:\nany other rubric\n###Feedback:")


def test_feedback_collection_record() -> None:
    """Field names and types as on the hub: the score is a text."""
    record = read_feedback(
        {**PARTS, "instruction": PROMPT + " ", "orig_score": "4", "orig_feedback": " Fine. ", "output": "x [RESULT] 4"}
    )
    assert (record.label, record.cot) == (4.0, "Fine.")
    assert record.fields["prompt"] == PROMPT
    assert load_template("prometheus").render(record.fields) == PROMPT


def test_feedback_records_of_the_repository() -> None:
    """One number in gpt4_score, the critique only in the output."""
    row = {"instruction": PROMPT, "gpt4_score": 3, "output": "Feedback: So so. [RESULT] 3"}
    record = read_feedback(row, score="gpt4_score")
    assert (record.label, record.cot) == (3.0, "So so.")
    assert read_feedback({"instruction": PROMPT, "orig_score": "2"}).cot is None


def test_the_prompts_parts_do_without_the_finished_prompt() -> None:
    for read in (read_feedback, read_evaluation):
        record = read({**PARTS, "orig_score": 4, "gpt4_score": 4})
        assert load_template("prometheus").render(record.fields) == PROMPT
        assert "prompt" not in record.fields and record.label == 4.0


def evaluation(**fields: object) -> dict[str, object]:
    feedback = ["one", "two", "three"]
    return {
        "idx": 7,
        "response_source": "vicuna",
        "category": "generic",
        "instruction": f'  {PROMPT} ",',
        "gpt4_score": [5, 2, 3],
        "gpt4_feedback": feedback,
        **fields,
    }


def test_evaluation_record_averages_its_annotations() -> None:
    record = read_evaluation(evaluation())
    assert record.label == pytest.approx(10 / 3)
    assert record.cot == "three"  # the critique whose score is nearest to the mean
    assert record.fields["prompt"] == PROMPT  # cleaned as in the published evaluation
    assert record.meta == {"idx": 7, "response_source": "vicuna", "category": "generic", "gpt4_score": [5, 2, 3]}


def test_human_scores_as_labels() -> None:
    record = read_evaluation(evaluation(human_score=[4, None, 5.0]), score="human_score")
    assert (record.label, record.cot) == (4.5, "one")
    empty = read_evaluation(evaluation(human_score=[]), score="human_score")
    assert (empty.scores, empty.cot) == ([], None)


def test_jsonl_record() -> None:
    record = read_jsonl({"prompt": "p", "label": "2", "cot": "c", "id": 3, "n": 1, "flag": True})
    assert (record.label, record.cot, record.id) == (2.0, "c", "3")
    assert record.fields == {"prompt": "p", "label": "2", "cot": "c", "id": "3", "n": "1"}
    assert record.meta == {"n": 1, "flag": True}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": None}]
    assert read_jsonl({"messages": messages}).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "high"}, "'label' is 'high'; it must be a finite number"),
        ({"label": True}, "'label' is True"),
        ({"label": [1, float("nan")]}, "'label' is nan"),
        ({"label": {"a": 1}}, "'label' is {'a': 1}"),
        ({"messages": []}, "'messages' must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "each needs the texts 'role' and 'content'"),
    ],
)
def test_bad_jsonl_records(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        read_jsonl({"prompt": "p", **fields})


def test_bad_published_records() -> None:
    with pytest.raises(BadRecord, match=r"no text in 'instruction', .*none of its parts .*is data\.\*\.format right"):
        read_feedback({"prompt": "p", "orig_score": 1})
