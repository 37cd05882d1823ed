import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_megatron.config import ScaleConfig
from real_megatron.data.tiny_judge import (
    ANCHOR,
    FIVE,
    HUNDRED,
    IN_DOMAIN,
    MARKS,
    REVERSED,
    SHIFTED,
    SLOTS,
    Domain,
    Grades,
    Habits,
    Problem,
    build_config,
    build_tokenizer,
    draw_problem,
    human_critique,
    true_critique,
    write_task,
)
from real_megatron.scores import ScoreScale

CHANGES = {"good": 1, "slip": -1, "note": 0}

FILES = {"train_sft": 60, "train_rl": 40, "test_in_domain": 30, "test_ood": 30}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("task"), seed=0)


def write(directory: Path, seed: int) -> Path:
    write_task(directory, seed, FILES["train_sft"], FILES["train_rl"], FILES["test_ood"])
    return directory


def rows(task: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]


def problems(domain: Domain, count: int = 4000, grades: Grades = FIVE) -> list[Problem]:
    rng = random.Random(0)
    return [draw_problem(rng, domain, grades) for _ in range(count)]


def test_a_problem_by_hand() -> None:
    problem = Problem(2, ("good", "reversed", "slip", "note", "reversed", "slip"))
    assert true_critique(problem) == "3 3 2 2 4 3" and problem.label == 3
    assert problem.prompt == "start 2 marks good reversed slip note reversed slip - - - - - critique:"


@pytest.mark.parametrize("domain", [IN_DOMAIN, SHIFTED])
def test_the_running_score_never_leaves_the_scale_so_that_every_mark_counts(domain: Domain) -> None:
    """Each mark adds its change with the sign of the reversals after it: the label in closed form, nothing cut off."""
    for problem in problems(domain):
        assert set(problem.states) <= {1, 2, 3, 4, 5}
        label, sign = 0, 1
        for mark in reversed(problem.marks):
            label += sign * (6 if mark == REVERSED else CHANGES[mark])
            sign = -sign if mark == REVERSED else sign
        assert problem.label == label + sign * problem.start


def test_domains_differ_as_stated() -> None:
    inside, outside = problems(IN_DOMAIN), problems(SHIFTED)
    assert {len(p.marks) for p in inside} == {6, 7, 8, 9} and {len(p.marks) for p in outside} == {8, 9, 10}
    assert max(len(p.marks) for p in outside) < SLOTS  # a blank always follows

    def shares(drawn: list[Problem]) -> dict[str, float]:
        counts = Counter(mark for p in drawn for mark in p.marks)
        return {mark: counts[mark] / counts.total() for mark in MARKS}

    a, b = shares(inside), shares(outside)
    assert 0.35 < a[REVERSED] < 0.45 < 0.5 < b[REVERSED] < 0.6
    assert a["note"] > 0.05 and b["note"] == 0
    for drawn in (inside, outside):  # no score is rare, none a good guess
        labels = Counter(p.label for p in drawn)
        assert all(0.1 < labels[k] / len(drawn) < 0.35 for k in range(1, 6))


def test_graders_without_bad_habits_are_right_and_overlooked_reversals_are_the_only_mistake_of_others() -> None:
    rng, forgetful = random.Random(0), Habits(forget_reversal=1, miscount=0, guess=0)
    for problem in problems(IN_DOMAIN, 300):
        assert human_critique(rng, problem, Habits(0, 0, 0)) == true_critique(problem)
        right = human_critique(rng, problem, forgetful) == true_critique(problem)
        turned = any(m == REVERSED and s != 3 for m, s in zip(problem.marks, problem.states, strict=True))
        assert right != turned  # 6 − 3 is 3


def steps_off(problem: Problem, critique: str) -> Counter[str]:
    """How often a mark was read wrongly, by kind of mark; steps from a score that leaves the scale are not counted."""
    result: Counter[str] = Counter()
    before = problem.start
    for mark, after in zip(problem.marks, map(int, critique.split()), strict=True):
        right = 6 - before if mark == REVERSED else before + CHANGES[mark]
        if 1 < right < 5 and (mark != REVERSED or right != before):
            result[mark] += 1
            result[f"wrong {mark}"] += after != right
        before = after
    return result


def test_graders_go_wrong_as_often_as_their_habits_say() -> None:
    rng, habits = random.Random(1), Habits()
    drawn = problems(IN_DOMAIN)
    critiques = [human_critique(rng, problem, habits) for problem in drawn]
    guessed = sum(critique.startswith("seems") for critique in critiques) / len(critiques)
    assert guessed == pytest.approx(habits.guess, abs=0.02)
    counts: Counter[str] = Counter()
    worked = [(p, c) for p, c in zip(drawn, critiques, strict=True) if not c.startswith("seems")]
    for problem, critique in worked:
        counts += steps_off(problem, critique)
    for mark in CHANGES:
        assert counts[f"wrong {mark}"] / counts[mark] == pytest.approx(habits.miscount, abs=0.008), mark
    # A reversal that was overlooked and then miscounted stays wrong (4 → 4 ± 1 is not 2).
    overlooked = habits.forget_reversal + (1 - habits.forget_reversal) * habits.miscount
    assert counts[f"wrong {REVERSED}"] / counts[REVERSED] == pytest.approx(overlooked, abs=0.01)
    # One critique in four that works it out ends on a wrong score: imitation has a ceiling.
    wrong = sum(int(critique.split()[-1]) != problem.label for problem, critique in worked) / len(worked)
    assert 0.2 < wrong < 0.3


def test_labels_follow_from_the_prompts_and_sizes_are_as_asked(task: Path) -> None:
    for name, size in FILES.items():
        read = rows(task, name)
        assert len(read) == size and len({row["id"] for row in read}) == size
        for row in read:
            _, start, _, *slots, _ = str(row["prompt"]).split()
            assert len(slots) == SLOTS
            marks = tuple(slot for slot in slots if slot != "-")
            assert slots[: len(marks)] == list(marks) and len(marks) < SLOTS
            assert row["label"] == Problem(int(start), marks).label
            assert ("cot" in row) == (name == "train_sft")


def test_test_sets_hold_nothing_that_is_trained_on(tmp_path: Path) -> None:
    """Many draws from few marks would repeat; what a test set holds is drawn anew for training."""
    write_task(tmp_path, seed=0, sft=3000, rl=3000, test=300)
    prompts = {name: [row["prompt"] for row in rows(tmp_path, name)] for name in FILES}
    tests = prompts["test_in_domain"] + prompts["test_ood"]
    assert len(set(tests)) == len(tests)
    assert not set(tests) & {*prompts["train_sft"], *prompts["train_rl"]}


def test_files_are_a_function_of_the_seed(task: Path, tmp_path: Path) -> None:
    again, other = write(tmp_path / "again", seed=0), write(tmp_path / "other", seed=1)
    for name in (*(f"{name}.jsonl" for name in FILES), "model/model.safetensors"):
        assert (task / name).read_bytes() == (again / name).read_bytes()
        assert (task / name).read_bytes() != (other / name).read_bytes()


def test_tokenizer_round_trip(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    for name in FILES:
        for row in rows(task, name):
            text = f"{row['prompt']} {row.get('cot', '')} {ANCHOR} {row['label']}"
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids).split() == text.split() and tokenizer.unk_token_id not in ids
            assert len(ids) == len(text.split())  # one token a word
    assert len(build_tokenizer()) == len(FIVE.vocabulary) == len(set(FIVE.vocabulary))
    scale = ScoreScale.resolve(tokenizer, list("12345"), anchor=f"{ANCHOR} ")
    assert tokenizer.convert_ids_to_tokens(scale.score_ids) == list("12345")


def test_scores_to_a_hundred_are_written_in_digits() -> None:
    """The label in closed form, as of 1 to 5; every score is a path of digits, of which a tree has eleven nodes."""
    drawn = problems(IN_DOMAIN, 500, HUNDRED)
    for problem in drawn:
        assert all(10 <= state <= 90 for state in problem.states)
        label, sign = 0, 1
        for mark in reversed(problem.marks):
            label += sign * (100 if mark == REVERSED else 10 * CHANGES[mark])
            sign = -sign if mark == REVERSED else sign
        assert problem.label == label + sign * problem.start
    assert {problem.label for problem in drawn} == set(range(10, 91, 5))
    tokenizer = build_tokenizer(HUNDRED)
    text = f"{drawn[0].prompt} {true_critique(drawn[0])} {ANCHOR} {drawn[0].label}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Marks and running scores stand two tokens apart, at the same distance from each other.
    count = len(drawn[0].marks)
    marks = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token in MARKS]
    assert [b - a for a, b in zip(marks, marks[1:], strict=False)] == [2] * (count - 1)
    assert len(ids) == 1 + 2 + 1 + 2 * SLOTS + 1 + 2 * count + 1 + 2
    assert tokenizer.unk_token_id not in ids
    assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())
    scale = ScoreScale.of(tokenizer, ScaleConfig.model_validate({"scores": "0..100"}))
    assert [tokenizer.convert_ids_to_tokens(path) for path in scale.tree.paths] == [list(str(k)) for k in range(101)]
    assert len(scale.tree.branches) == 11 and scale.tree.width == 10 + 9 * 10 + 1


def test_two_aspects_are_the_last_and_the_highest_score(tmp_path: Path) -> None:
    write_task(tmp_path, 0, 20, 20, 20, grades=replace(FIVE, aspects=True))
    write_task(tmp_path / "one", 0, 20, 20, 20)
    for row, plain in zip(rows(tmp_path, "train_rl"), rows(tmp_path / "one", "train_rl"), strict=True):
        _, start, _, *slots, _ = str(row["prompt"]).split()
        states = Problem(int(start), tuple(slot for slot in slots if slot != "-")).states
        assert row["label"] == {"final": states[-1], "peak": max(states)}
        assert row["prompt"] == plain["prompt"] and plain["label"] == states[-1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    aspects = {name: {"anchor": f"{name} "} for name in ("final", "peak")}
    scale = ScoreScale.of(tokenizer, ScaleConfig.model_validate({"aspects": aspects}))
    assert [tokenizer.decode(branch.path) for branch in scale.tree.branches] == ["final", "peak"]


def test_the_checkpoint_is_a_small_qwen3(task: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    assert model.config.model_type == "qwen3" and model.config.vocab_size == build_config().vocab_size
    assert 0.8e6 < model.num_parameters() < 1.3e6
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert model.get_input_embeddings().weight.norm(dim=1).min() > 0.1  # RMSNorm is steep at zero
