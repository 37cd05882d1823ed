"""The scales of several aspects, on tokenizers: one tree, in which each aspect's own anchor is given."""

import pytest
import torch

from real_megatron.batch.score_logprobs import score_logprobs
from real_megatron.config import RunConfig, ScaleConfig
from real_megatron.errors import ConfigError
from real_megatron.scores import ScoreScale, weighted_mean
from tests.support.scale_tokenizers import KINDS

RUBRIC = "{coherence: {}, facts: {scores: 0..10, weight: 2}, tone: {anchor: 'Tone (A-C): ', scores: [A, B, C]}}"
KNOWN = ("gpt2", "bytes", "llama3", "qwen", "mistral", "sentencepiece-joined")


def config(aspects: str = RUBRIC, *more: str) -> ScaleConfig:
    return RunConfig.from_yaml(None, [f"scale.aspects={aspects}", *more]).scale


@pytest.mark.parametrize("kind", KNOWN)
def test_every_score_is_its_text_behind_the_anchors(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    scale = ScoreScale.of(tokenizer, config())
    assert [(a.name, a.weight, a.first, len(a.values)) for a in scale.aspects] == [
        ("coherence", 1, 0, 5),
        ("facts", 2, 5, 11),
        ("tone", 1, 16, 3),
    ]
    assert scale.values == [1, 2, 3, 4, 5, *range(11), 1, 2, 3] and scale.tree.size == 19
    anchors = ["coherence: "] * 5 + ["facts: "] * 11 + ["Tone (A-C): "] * 3
    for path, text, anchor in zip(scale.tree.paths, scale.texts, anchors, strict=True):
        ids = tokenizer.encode(f"\n[RESULT] {anchor}{text}", add_special_tokens=False)
        assert (
            ids[-len(path) :] == list(path) and ids[-len(path) - len(scale.anchor_ids) : -len(path)] == scale.anchor_ids
        )
    assert scale.anchor_text.strip() == "[RESULT]"


def test_each_aspects_log_probs_are_those_of_its_own_scale() -> None:
    """The tree of all asks what the trees of each ask, one after the other, and reads it in the same way."""
    tokenizer = KINDS["qwen"][0]()
    scale = ScoreScale.of(tokenizer, config())
    alone = [
        ScoreScale.resolve(tokenizer, list("12345"), anchor="[RESULT] coherence: "),
        ScoreScale.resolve(tokenizer, [str(k) for k in range(11)], anchor="[RESULT] facts: "),
        ScoreScale.resolve(tokenizer, list("ABC"), anchor="[RESULT] Tone (A-C): "),
    ]
    widths = [one.tree.width for one in alone]
    assert scale.tree.width == sum(widths)
    asked = torch.randn(4, scale.tree.width, dtype=torch.float64) - 5
    together = score_logprobs(scale.tree, asked)
    for aspect, one, own in zip(scale.aspects, alone, asked.split(widths, dim=1), strict=True):
        assert torch.equal(together[:, aspect.columns], score_logprobs(one.tree, own))
    start = 0
    for one in alone:
        mine = scale.tree.branches[start : start + len(one.tree.branches)]
        given = tuple(one.anchor_ids[len(scale.anchor_ids) :])
        assert [branch.path for branch in mine] == [given + branch.path for branch in one.tree.branches]
        assert [branch.ids for branch in mine] == [branch.ids for branch in one.tree.branches]
        start += len(mine)
    assert not scale.tree.flat and scale.tree.most_tokens == max(map(len, scale.tree.paths))
    assert hash(scale.tree) == hash(ScoreScale.of(tokenizer, config()).tree)
    assert scale.tree == ScoreScale.of(tokenizer, config()).tree != alone[0].tree


def test_what_an_aspect_does_not_say_is_the_scales() -> None:
    tokenizer = KINDS["bytes"][0]()
    given = config("{a: {}, b: {scores: [x, y], values: [0, 1]}}", "scale.scores=1..3", "scale.values=[5, 6, 7]")
    scale = ScoreScale.of(tokenizer, given)
    assert scale.texts == ["1", "2", "3", "x", "y"] and scale.values == [5, 6, 7, 0, 1]
    spelled = config("{a: {}, b: {scores: [x, y]}}", "scale.spellings={'5': [five]}")
    assert len(ScoreScale.of(tokenizer, spelled).tree.spellings) == 5 + 1 + 2
    assert [part.name for part in ScoreScale.of(tokenizer, ScaleConfig()).parts] == [""]


@pytest.mark.parametrize(
    ("aspects", "message"),
    [
        ("{a: {}}", "aspects has one aspect: give two or more"),
        ("{a: {}, 'b c': {}}", "aspects: 'b c' names metrics and files"),
        ("{a: {anchor: 'X: '}, b: {anchor: 'X: '}}", "scale.aspects: the anchors of a, b must differ"),
        ("{a: {}, b: {scores: [1, 2], values: [1]}}", "scale.aspects.b: .*has 1 entries for 2 scores"),
        ("{a: {}, b: {weight: 0}}", "weight"),
        ("{a: {}, b: {scores: 5..1}}", "5..1.*must be above"),
    ],
)
def test_a_bad_rubric_is_refused(aspects: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreScale.of(KINDS["bytes"][0](), config(aspects))


def test_means_by_weight_are_over_what_is_there() -> None:
    aspects = ScoreScale.of(KINDS["bytes"][0](), config()).aspects
    assert weighted_mean(aspects, [1.0, 4.0, 3.0]) == 3.0
    assert weighted_mean(aspects, [1.0, None, 3.0]) == 2.0
