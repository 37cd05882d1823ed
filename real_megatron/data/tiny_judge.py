"""A synthetic judging task, small enough for a laptop CPU, on which a better chain of thought gives a better score.

A candidate's work is a list of marks that a grader reads in order. Each mark changes the running score, within 1 to 5:

    good +1    great +2    slip −1    error −2    note 0    reversed: what stood is turned on its head, s becomes 6 − s

The label is the score after the last mark. Written down one after another, each step is a small table look-up. The
critiques that come with the training set are human-like: they skip the reversal about half of the time, slip by one now
and then, and some guess instead of working it out. Labels are always right. So imitation learns the graders' habits,
and only a reward on the score can unlearn them. A model trained to answer without a critique does about as well as one
that imitates these, because the limits of 1 and 5 make early marks count less than late ones.

    python -m real_megatron.data.tiny_judge --output DIR [--seed 0]

writes train_sft.jsonl, train_rl.jsonl, test_in_domain.jsonl, test_ood.jsonl and model/, a random checkpoint.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LOWEST, HIGHEST = 1, 5
CHANGES = {"good": 1, "great": 2, "slip": -1, "error": -2, "note": 0}
REVERSED = "reversed"
MARKS = (*CHANGES, REVERSED)
SLOTS = 10
BLANK = "-"
ANCHOR = "[RESULT]"
GUESSES = ("seems", "overall", "fine", "weak")
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (
    PAD,
    EOS,
    UNKNOWN,
    ANCHOR,
    *map(str, range(LOWEST, HIGHEST + 1)),
    *MARKS,
    BLANK,
    *GUESSES,
    "start",
    "marks",
    "critique:",
)


@dataclass(frozen=True)
class Domain:
    """Where problems come from: how many marks, and how often each kind."""

    marks: tuple[int, int]
    """Fewest and most marks; the remaining slots stay blank."""
    weights: Mapping[str, float]


IN_DOMAIN = Domain((6, 9), {"good": 2, "great": 1, "slip": 2, "error": 1, "note": 1, REVERSED: 2})
SHIFTED = Domain((8, 10), {"good": 1, "great": 2, "slip": 1, "error": 2, "note": 0, REVERSED: 4})
"""Longer work (ten marks were never seen), harsher and kinder marks, and far more reversals."""


@dataclass(frozen=True)
class Habits:
    """How the graders who wrote the training critiques go wrong."""

    forget_reversal: float = 0.5
    slip: float = 0.04
    guess: float = 0.15


@dataclass(frozen=True)
class Problem:
    start: int
    marks: tuple[str, ...]

    @property
    def states(self) -> list[int]:
        """The running score after each mark."""
        states, state = [], self.start
        for mark in self.marks:
            state = change(state, mark)
            states.append(state)
        return states

    @property
    def label(self) -> int:
        return self.states[-1]

    @property
    def prompt(self) -> str:
        slots = [*self.marks, *[BLANK] * (SLOTS - len(self.marks))]
        return " ".join(("start", str(self.start), "marks", *slots, "critique:"))


def change(state: int, mark: str) -> int:
    """The running score after one more mark."""
    if mark == REVERSED:
        return LOWEST + HIGHEST - state
    return min(HIGHEST, max(LOWEST, state + CHANGES[mark]))


def draw_problem(rng: random.Random, domain: Domain) -> Problem:
    count = rng.randint(*domain.marks)
    kinds, weights = zip(*domain.weights.items(), strict=True)
    return Problem(rng.randint(LOWEST, HIGHEST), tuple(rng.choices(kinds, weights, k=count)))


def true_critique(problem: Problem) -> str:
    """The running scores, one a mark."""
    return " ".join(map(str, problem.states))


def human_critique(rng: random.Random, problem: Problem, habits: Habits) -> str:
    """A critique with the graders' habits; its last score need not be the label."""
    if rng.random() < habits.guess:
        return f"{GUESSES[0]} {rng.choice(GUESSES[2:])} {GUESSES[1]}"
    states, state = [], problem.start
    for mark in problem.marks:
        if mark != REVERSED or rng.random() >= habits.forget_reversal:
            state = change(state, mark)
        if rng.random() < habits.slip:
            state = min(HIGHEST, max(LOWEST, state + rng.choice((-1, 1))))
        states.append(state)
    return " ".join(map(str, states))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def build_config() -> Qwen3Config:
    """Qwen3's architecture with about a million parameters."""
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None,
        dtype="float32",
    )


def write_task(
    output: Path, seed: int = 0, sft: int = 6000, rl: int = 6000, test: int = 500, habits: Habits | None = None
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
                problem = draw_problem(rng, domain)
                while problem in seen:
                    problem = draw_problem(rng, domain)
                if name.startswith("test"):
                    seen.add(problem)
                row = {"id": f"{name}-{index}", "prompt": problem.prompt, "label": problem.label}
                if name == "train_sft":
                    row["cot"] = human_critique(rng, problem, habits)
                file.write(json.dumps(row) + "\n")
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(build_config())
    model.save_pretrained(output / "model")
    build_tokenizer().save_pretrained(output / "model")


def main(
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of problems, critiques and weights.")] = 0,
) -> None:
    """Write the tiny-judge task: data files and a random checkpoint."""
    write_task(output, seed)
    typer.echo(f"wrote the tiny-judge task to {output}")


if __name__ == "__main__":
    typer.run(main)
