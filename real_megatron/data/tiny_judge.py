"""A synthetic judging task, small enough for a laptop CPU, that a small model cannot solve without a chain of thought.

The judge reads a start score and then marks on a candidate's work, in order, and gives the final score, 1 to 5:

    good +1    slip −1    note 0    reversed: the score so far s becomes 6 − s

    prompt   start 2 marks good reversed slip note reversed slip - - - - - critique:
    answer   3 3 2 2 4 3 [RESULT] 3

Why a critique helps: whether a mark counts for or against depends on how many reversals follow it. Marks are drawn so
that the running score never leaves 1 to 5; it is never clamped, so the first mark matters as much as the last. A direct
answer needs the parity of the reversals after every mark, which a few layers do not learn; written out, each step is
one small table look-up. A direct answer has only a hint: after a last `good` the score cannot be 1.

The graders' noise: the critiques of the training set have errors as humans make them (`Habits`). They overlook
reversals, miscount, and some consist of "seems fine overall" only. The labels are right. So imitation learns the
graders' habits, and only a reward on the score's error can remove them.

The same task on a scale of 0 to 100 (`HUNDRED`): good +10, slip −10, reversed: s becomes 100 − s, from 10 to 90 in
steps of 5. Numbers are written in digits, one token each. A comma follows each mark, so that marks stand as far apart
in the prompt as running scores in the critique.

The same task with two aspects (`ASPECTS`): `final` is that score, `peak` the highest one on the way.

What changes out of domain (`SHIFTED`): longer work (ten marks were never seen), half of it reversals, no notes.

    python -m real_megatron.data.tiny_judge --output DIR [--seed 0] [--highest 100] [--aspects]

writes train_sft.jsonl (with critiques), train_rl.jsonl, test_in_domain.jsonl, test_ood.jsonl and model/, a random
checkpoint of a million parameters.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

REVERSED = "reversed"
MARKS = ("good", "slip", "note", REVERSED)
SLOTS = 11
"""One more than the largest number of marks: a blank always marks the end of the work."""
BLANK, COMMA = "-", ","
ANCHOR = "[RESULT]"
GUESSES = ("seems", "overall", "fine", "weak")
ASPECTS = ("final", "peak")
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class Grades:
    """The scores of the task, and what a mark adds to the running one."""

    lowest: int
    highest: int
    step: int
    """What `good` adds and `slip` takes away."""
    grain: int = 1
    """Start scores, and so all running ones, are the lowest plus a multiple of it."""
    aspects: bool = False
    """Whether there are two labels, those of `ASPECTS`."""

    def change(self, state: int, mark: str) -> int:
        """The running score after one more mark."""
        if mark == REVERSED:
            return self.lowest + self.highest - state
        return state + self.step * {"good": 1, "slip": -1, "note": 0}[mark]

    def hold(self, state: int) -> bool:
        """Whether a number is a score."""
        return self.lowest <= state <= self.highest

    def clamp(self, state: int) -> int:
        """The number limited to the scores, as a grader who has miscounted writes it."""
        return min(self.highest, max(self.lowest, state))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of the task: the scores, or where they have several digits these."""
        digits = range(10) if self.in_digits else range(self.lowest, self.highest + 1)
        words = (PAD, EOS, UNKNOWN, ANCHOR, *map(str, digits), *MARKS, BLANK, *GUESSES, "start", "marks", "critique:")
        return (*words, *(ASPECTS if self.aspects else ()), *((COMMA,) if self.in_digits else ()))

    @property
    def in_digits(self) -> bool:
        """Whether a score is two tokens."""
        return self.highest > 9


FIVE = Grades(1, 5, 1)
HUNDRED = Grades(10, 90, 10, grain=5)


@dataclass(frozen=True)
class Domain:
    """A distribution of problems: how many marks, and how often each kind."""

    marks: tuple[int, int]
    """Fewest and most marks; the remaining slots stay blank."""
    weights: Mapping[str, float]
    """Relative frequency of each kind of mark, among those that keep the running score within the scale."""


IN_DOMAIN = Domain((6, 9), {"good": 3, "slip": 3, "note": 1, REVERSED: 4})
SHIFTED = Domain((8, 10), {"good": 3, "slip": 3, REVERSED: 6})
"""Longer work (ten marks were never seen) and more reversals."""


@dataclass(frozen=True)
class Habits:
    """The errors of the graders who wrote the training critiques."""

    forget_reversal: float = 0.05
    """Probability of overlooking a reversal."""
    miscount: float = 0.03
    """Probability, at each mark, of being off by one."""
    guess: float = 0.1
    """Fraction of critiques without any running score."""


@dataclass(frozen=True)
class Problem:
    start: int
    marks: tuple[str, ...]
    grades: Grades = FIVE

    @property
    def states(self) -> list[int]:
        """The running score after each mark."""
        states, state = [], self.start
        for mark in self.marks:
            state = self.grades.change(state, mark)
            states.append(state)
        return states

    @property
    def label(self) -> int:
        return self.states[-1]

    @property
    def peak(self) -> int:
        return max(self.states)

    @property
    def prompt(self) -> str:
        slots = [*self.marks, *[BLANK] * (SLOTS - len(self.marks))]
        if self.grades.in_digits:
            slots = [f"{slot} {COMMA}" for slot in slots]
        return " ".join(("start", str(self.start), "marks", *slots, "critique:"))


def draw_problem(rng: random.Random, domain: Domain, grades: Grades = FIVE) -> Problem:
    """A problem whose running score never leaves the scale."""
    count = rng.randint(*domain.marks)
    start = state = rng.randrange(grades.lowest, grades.highest + 1, grades.grain)
    marks: list[str] = []
    for _ in range(count):
        fitting = {m: w for m, w in domain.weights.items() if grades.hold(grades.change(state, m))}
        (mark,) = rng.choices(list(fitting), list(fitting.values()))
        marks.append(mark)
        state = grades.change(state, mark)
    return Problem(start, tuple(marks), grades)


def true_critique(problem: Problem) -> str:
    """The running scores, one per mark."""
    return " ".join(map(str, problem.states))


def human_critique(rng: random.Random, problem: Problem, habits: Habits) -> str:
    """A critique with the graders' habits; its last score need not be the label."""
    if rng.random() < habits.guess:
        return f"{GUESSES[0]} {rng.choice(GUESSES[2:])} {GUESSES[1]}"
    grades, states, state = problem.grades, [], problem.start
    for mark in problem.marks:
        if mark != REVERSED or rng.random() >= habits.forget_reversal:
            state = grades.clamp(grades.change(state, mark))
        if rng.random() < habits.miscount:
            state = grades.clamp(state + grades.step * rng.choice((-1, 1)))
        states.append(state)
    return " ".join(map(str, states))


def build_tokenizer(grades: Grades = FIVE) -> PreTrainedTokenizerFast:
    """One token per word, and per digit of a number."""
    words = {word: i for i, word in enumerate(grades.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if grades.in_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [tokenizer.pre_tokenizer, pre_tokenizers.Digits(individual_digits=True)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def build_config(grades: Grades = FIVE) -> Qwen3Config:
    """Qwen3's architecture with about a million parameters.

    Without `pad_token_id`: transformers would set that token's embedding to zero, where RMSNorm's derivative is
    1/√ε = 1000, and one `<pad>` that the model samples would dominate the gradient of its whole step.
    """
    return Qwen3Config(
        vocab_size=len(grades.vocabulary),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=grades.vocabulary.index(EOS),
        bos_token_id=None,
        dtype="float32",
    )


def write_task(
    output: Path,
    seed: int = 0,
    sft: int = 6000,
    rl: int = 6000,
    test: int = 500,
    habits: Habits | None = None,
    grades: Grades = FIVE,
) -> None:
    """Write the data files and the random checkpoint. Every file is a function of `seed` and its size alone."""
    output.mkdir(parents=True, exist_ok=True)
    habits = habits or Habits()
    seen: set[Problem] = set()
    # Test sets first: what they hold is kept out of the training sets.
    for name, count, domain in (
        ("test_in_domain", test, IN_DOMAIN),
        ("test_ood", test, SHIFTED),
        ("train_sft", sft, IN_DOMAIN),
        ("train_rl", rl, IN_DOMAIN),
    ):
        rng = random.Random(f"{seed} {name}")
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                problem = draw_problem(rng, domain, grades)
                while problem in seen:
                    problem = draw_problem(rng, domain, grades)
                if name.startswith("test"):
                    seen.add(problem)
                label = {"final": problem.label, "peak": problem.peak} if grades.aspects else problem.label
                row = {"id": f"{name}-{index}", "prompt": problem.prompt, "label": label}
                if name == "train_sft":
                    row["cot"] = human_critique(rng, problem, habits)
                file.write(json.dumps(row) + "\n")
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(build_config(grades))
    model.save_pretrained(output / "model")
    build_tokenizer(grades).save_pretrained(output / "model")


def main(
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of problems, critiques and weights.")] = 0,
    highest: Annotated[int, typer.Option(help="Scores 1 to 5, or 0 to 100.")] = 5,
    aspects: Annotated[bool, typer.Option("--aspects", help="Two labels: the final score and the highest.")] = False,
) -> None:
    """Write the tiny-judge task: data files and a random checkpoint."""
    scales = {5: FIVE, 100: HUNDRED}
    if highest not in scales:
        raise typer.BadParameter(f"{highest}: the highest score is 5 or 100")
    write_task(output, seed, grades=replace(scales[highest], aspects=aspects))
    typer.echo(f"wrote the tiny-judge task to {output}")


if __name__ == "__main__":
    typer.run(main)
