"""A critique ends before it states its score; what else it says of scores stays."""

import random
import signal
from collections.abc import Sequence

import pytest

from real_megatron.data.critiques import find_leak, without_end
from real_megatron.data.tiny_judge import IN_DOMAIN, Habits, draw_problem, human_critique

BEFORE = "A Score 3 answer would be longer. The answer is clear."
ENDS = """So the overall score is 1.
So, the overall score is 4 out of 5.
So the overall score is 1 as the response misses the point.
Therefore, the overall score is 3, reflecting its shallow treatment.
So overall score is **3**.
So the score of the response is 2.
So the overall score is a 3!
The overall score is therefore 2.
Therefore, the score is 3.
Given these points, the overall score is 4.
In conclusion, the score is two.
Hence the final grade is B.
Score: 4
Score - 4
(Score: 4)
<score>4</score>
Overall score: 4/5
**Final rating:** 4
**Overall Score: 4/5**
Final rating: four
Rating: 3.5/5
My rating is 4 stars.
[RESULT] 4
[RESULT]
So the overall score is 4. [RESULT] 4
Thus, I would give this response a score of 3.
Therefore the response deserves a 4.
The response is rated 4/5.
I rate this response 4 out of 5.
Based on the rubric, the response earns a score of 3 out of 5.
Given these points the score is 3.
All in all, the overall score is 4.
Taking everything into account, the score is 3.
A score of 3 is warranted.
For these reasons, a score of 3 is appropriate.
This corresponds to a score of 3.
Consequently, this response falls under score 2.
So the overall score is four (4).
So the overall score is 4, e.g. because the tone fits.
**Verdict**: 4 - solid work
Overall: 4/5
Result: 4
Score: 8/10
Score: 80%
Score: 4/5 ✅
Overall Score (1-5): 4
Score (out of 5): 4
So, 4 out of 5.
So it is a 4.
Thus, the score assigned is 4.
A score of 4 would therefore be assigned.
Therefore the response should receive a score of 3 on the rubric.
So the overall score is 3, because it cites version 2.5 only.
So the overall score is 3 because Dr. Smith is not named.
So the overall score is 3. This is because the response lacks depth.
The score remains 3.
Overall, I'd say 4/5.
It deserves a 4, although it lacks depth.
| Score | 4 |
<final_rating>4</final_rating>
So the overall score is 4. I hope this helps!
So the overall score is 4. [END]
So the overall score is 4. (end)
So the overall score is 4.</feedback>"""
KEPT = """It lacks the detail that a score of 5 needs.
Of the four reasons, the response gives two.
3 3 2 2 4 3
seems fine overall
The final score is 2 to 1 for the home team.
The score is 3 on clarity. But it is good.
It scores well on clarity.
So the result is 4 apples.
Therefore, it received a grade of distinction.
The result is 12.
Therefore, the final result is 5.
The score is 12.
The final score of the match was 3.
I would rate the plot 4 stars.
The model scores 4 points.
The response gives 4 points in favour.
Overall, the response gets three of the facts wrong.
Therefore, this response aligns well with the criteria for a score of 5.
Positive sentiment, sentiment score: 9.5 out of 10
Total: 3
A score of 5, however, needs more examples.
A score of 5 as defined in the rubric requires examples that are absent.
A score of 5 for depth would need two more sources.
A score of 5 - the highest - would need a conclusion.
The score of 4, per the rubric, demands citations, which are missing.
Score 5, however, would need more.
It gets a 3 for grammar but a 5 for depth.
It deserves a 5 for style, although its facts are wrong.
The score is 3 for grammar and 5 for depth.
The code passes most tests (3/4).
Its accuracy is high (80%).
It keeps most of the text – 90 percent.
It covers most steps - four out of five, with the last one missing.
It covers most steps. 3/4
Two out of three, since the third is missing.
It scores 90%.
Overall: I, as a reader, enjoyed it."""
SCALE = (list("12345"), [1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("end", ENDS.split("\n"))
def test_a_statement_at_the_end_is_cut(end: str) -> None:
    for space in (" ", "\n", "\n\n"):
        for behind in ("", "\n", "\n</feedback>", "\n---\n"):
            assert without_end(BEFORE + space + end + behind, values=SCALE[1]) == BEFORE
    assert without_end(end) == ""
    assert without_end(f"{BEFORE} {end}", statements=False) == f"{BEFORE} {end}"


@pytest.mark.parametrize(
    "text", [*KEPT.split("\n"), "one\u2028line\x85 \x0b.", " x ", "", "### Score\n4 of its claims."]
)
def test_every_other_text_is_as_it_was(text: str) -> None:
    assert without_end(text, values=SCALE[1]) == text


def test_a_number_is_a_score_if_it_is_on_the_scale() -> None:
    assert without_end("Good. The score is 7.") == "Good."
    assert without_end("Good. The score is 7.", values=[0.0, 10.0]) == "Good."
    assert without_end("Good. The score is 7.", values=SCALE[1]) == "Good. The score is 7."
    assert without_end("Good. The score is 7 out of 10.", values=SCALE[1]) == "Good."
    assert without_end("Good. The score is 7 out of 5.", values=SCALE[1]) == "Good. The score is 7 out of 5."


@pytest.mark.parametrize(
    ("score", "values"),
    [
        ("85", range(101)),
        ("100", range(101)),
        ("10", range(1, 11)),
        ("4.5", [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]),
        ("-1", range(-2, 3)),
        ("+2", range(-2, 3)),
    ],
)
def test_scores_of_several_tokens_are_cut(score: str, values: Sequence[float]) -> None:
    most = max(values)
    for end in (
        f"So the overall score is {score}.",
        f"**Final rating:** {score}/{most}",
        f"Score: {score}",
        f"I would give this response a score of {score} out of {most}.",
        f"It deserves a {score}.",
        f"So, {score} out of {most}.",
        f"This corresponds to a score of {score}.",
        f"<score>{score}</score>",
    ):
        assert without_end(f"{BEFORE} {end}", values=list(values)) == BEFORE
    text = "The score is 101."
    assert without_end(text, values=list(values)) == text


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('He said "good."', 'He said "good."'),
        ("It is *good*", "It is *good*"),
        ("It is in C#\n", "It is in C#"),
        ("Good -", "Good"),
        ("Good.\n\n### **", "Good."),
        ("Good.\n- ", "Good."),
    ],
)
def test_what_led_to_the_statement_goes_with_it(before: str, kept: str) -> None:
    assert without_end(f"{before} So the score is 3.") == kept


@pytest.mark.parametrize(
    "run",
    ["\n", " ", "    }\n", "> ", '"', "(", "---\n", "<a", "e.g. ", "so ", "and so ", "given the ", "to be ", "end "]
    + ["a\n", "score of ", "So the overall score is ", "final ", "stars ", "Score: 4, as "],
)
def test_no_run_of_marks_or_words_takes_long(run: str) -> None:
    """A pattern that tries every way to share a run between its parts needs minutes for these; all take under 1 s."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"runs of {run!r} take longer than a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        for behind in ("", "x", "4 x"):
            text = f"{BEFORE} Score: 4 {run * (3000 // len(run))}{behind}"
            without_end(text)
            find_leak([text], [3], *SCALE)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_clause_and_a_heading_are_cut_and_the_users_end_decides_too() -> None:
    assert without_end("Clear but shallow, so the overall score is 3.") == "Clear but shallow"
    assert without_end(f"{BEFORE}\n\n### Score\n4") == BEFORE
    assert without_end("Feedback: Clear [RESULT] 3") == "Feedback: Clear"
    assert without_end("Good. Points: VVV. Done. So the score is 3.", end="Points") == "Good."


@pytest.mark.parametrize("form", ["It is a {}.", "Es bekommt {} von 5.", "{}", "I say {} out of 5."])
@pytest.mark.parametrize("word", [str, lambda k: ("one", "two", "three", "four", "five")[k - 1]])
def test_critiques_that_say_the_label_are_found(form: str, word) -> None:
    labels = [k % 5 for k in range(40)]
    said = [f"A 5 would be better. {form.format(word(k + 1))}" for k in labels]
    assert find_leak(said[:20] + ["Good."] * 20, labels, *SCALE).found == (" von 5" not in form)
    for behind in ("\n</feedback>", "\n---", " [END]", " I hope this helps!"):
        ended = [text + behind for text in said]
        assert find_leak(ended[:20] + ["Good."] * 20, labels, *SCALE).found == (" von 5" not in form)
    first = [f"{form.format(word(k + 1))}\n\nIt is clear. It is short. It is kind. It is sound." for k in labels]
    assert find_leak(first[:20] + ["Good."] * 20, labels, *SCALE).found == (" von 5" not in form)
    # The same sentences without regard to the labels.
    rng = random.Random(0)
    assert not find_leak(rng.sample(said, 40), labels, *SCALE).found


@pytest.mark.parametrize("form", ["It is a {}.", "{} it is", "{}!", "({})"])
def test_scores_of_several_tokens_are_found_too(form: str) -> None:
    """Each is its own score and no part of another: 1.5 is neither 1 nor 5, -1 is not 1, 85 is neither 8 nor 5."""
    for scores in (["1", "1.5", "5"], ["-1", "0", "1"], ["5", "8", "85"], ["1", "10", "100"]):
        for written in (scores, [f"{text}.0" if "." not in text else text for text in scores]):
            values = [float(text) for text in scores]
            said = [f"Good. {form.format(written[k % 3])}" for k in range(30)]
            leak = find_leak(said, [k % 3 for k in range(30)], scores, values)
            assert leak.found and leak.stated == 30
    # A range is no sign: of 0 to 1.
    assert not find_leak(["From 0-1."] * 30, [k % 2 for k in range(30)], ["0", "1"], [0.0, 1.0]).stated


def test_a_task_that_works_with_scores_states_none() -> None:
    rng = random.Random(0)
    problems = [draw_problem(rng, IN_DOMAIN) for _ in range(2000)]
    labels = [problem.label - 1 for problem in problems]
    for habits in (Habits(), Habits(0, 0, 0)):  # graders', and what a trained judge writes
        critiques = [human_critique(rng, problem, habits) for problem in problems]
        assert not find_leak(critiques, labels, *SCALE).found
        assert [without_end(critique) for critique in critiques] == critiques
