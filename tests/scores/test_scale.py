"""Score scales on tokenizers of every common kind: anchors, values, what is refused, and where a response is cut."""

import os
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from real_megatron.errors import ConfigError
from real_megatron.scores import ScoreScale
from tests.support.real_tokenizers import NAMES
from tests.support.scale_tokenizers import (
    DIGITS,
    KINDS,
    LETTERS,
    TEN,
    byte_level,
    gpt2,
    llama3,
    qwen,
    tokenizer_of,
    word_level,
    wrap,
)


@pytest.mark.parametrize("kind", KINDS)
def test_digits_resolve_in_context(kind: str) -> None:
    make, anchor_text = KINDS[kind]
    tokenizer = make()
    scale = ScoreScale.resolve(tokenizer, DIGITS, None, "[RESULT] ")
    assert scale.anchor_text == anchor_text
    assert scale.values == [1, 2, 3, 4, 5] and scale.texts == DIGITS
    assert len(set(scale.score_ids)) == 5
    # The tokenizer, asked in the middle of a text, agrees: good … anchor, score.
    for text, token in zip(DIGITS, scale.score_ids, strict=True):
        gap = " " if kind == "unigram" else "\n"  # which has no newline
        ids = tokenizer.encode(f"good{gap}[RESULT] {text}", add_special_tokens=False)
        assert ids[-1] == token and ids[-1 - len(scale.anchor_ids) : -1] == scale.anchor_ids
        assert scale.cut(tokenizer, ids) == len(ids) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_letters_resolve_and_count_from_one(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    scale = ScoreScale.resolve(tokenizer, LETTERS, None, "[RESULT] ")
    assert scale.values == [1, 2, 3, 4, 5]
    ids = tokenizer.encode("good\n[RESULT] C", add_special_tokens=False)
    assert ids[-1] == scale.score_ids[2] and scale.cut(tokenizer, ids) == len(ids) - 1


def test_where_the_space_belongs_to_the_letter_the_anchor_ends_before_it() -> None:
    """Llama-3- and Qwen-like: digits stand alone after a space, letters take it."""
    for tokenizer in (llama3(), qwen()):
        assert ScoreScale.resolve(tokenizer, DIGITS).anchor_text == "[RESULT] "
        scale = ScoreScale.resolve(tokenizer, LETTERS)
        assert scale.anchor_text == "[RESULT]"
        assert tokenizer.convert_ids_to_tokens(scale.score_ids) == ["ĠA", "ĠB", "ĠC", "ĠD", "ĠE"]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen", "bytes", "mistral"])
def test_a_scale_from_zero_to_nine(kind: str) -> None:
    scores = [str(k) for k in range(10)]
    tokenizer = KINDS[kind][0]() if kind != "gpt2" else byte_level([f"Ġ{k}" for k in range(10)])
    scale = ScoreScale.resolve(tokenizer, scores)
    assert scale.values == list(range(10)) and len(set(scale.score_ids)) == 10


def test_one_to_ten_works_where_ten_is_one_token() -> None:
    for tokenizer in (llama3(), gpt2(), word_level()):
        scale = ScoreScale.resolve(tokenizer, TEN)
        assert scale.values == list(range(1, 11))
        ids = tokenizer.encode("[RESULT] 10", add_special_tokens=False)
        assert ids[-1] == scale.score_ids[9]


def test_ids_come_from_the_tokenizer_and_never_from_a_models_name() -> None:
    """The same texts under other ids, with a path that names another family."""
    plain, reversed_ids = byte_level(), byte_level(reverse=True)
    reversed_ids.name_or_path = "/models/Qwen2.5-7B-Instruct-Mistral-Llama-3"
    a, b = ScoreScale.resolve(plain, DIGITS), ScoreScale.resolve(reversed_ids, DIGITS)
    assert a.anchor_text == b.anchor_text and not set(a.score_ids) & set(b.score_ids)
    assert [255 - i for i in a.score_ids] == b.score_ids


def test_listed_scores_with_their_values() -> None:
    tokenizer = byte_level(["Ġpoor", "Ġfair", "Ġgood"])
    scale = ScoreScale.resolve(tokenizer, ["poor", "fair", "good"], [0.0, 0.5, 1.0], "Verdict: ")
    assert scale.values == [0.0, 0.5, 1.0] and scale.anchor_text == "Verdict:"
    assert tokenizer.decode(scale.score_ids) == " poor fair good"
    falling = ScoreScale.resolve(tokenizer, ["good", "poor"], [2, 1], "Verdict: ")
    assert falling.values == [2.0, 1.0]


def test_anchors_of_other_scripts_and_special_tokens() -> None:
    tokenizer = byte_level()
    assert ScoreScale.resolve(tokenizer, DIGITS, None, "评分：").anchor_text == "评分："
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|result|>"]})
    scale = ScoreScale.resolve(tokenizer, DIGITS, None, "<|result|>")
    assert scale.anchor_ids == [tokenizer.convert_tokens_to_ids("<|result|>")]
    assert scale.cut(tokenizer, [5, *scale.anchor_ids, scale.score_ids[0]]) == 2


def test_a_begin_of_text_token_is_not_part_of_the_anchor() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer.bos_token_id not in ScoreScale.resolve(tokenizer, DIGITS).anchor_ids


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_anchor_tokens_continue_a_response(kind: str) -> None:
    """The rule `force` and supervised targets append `anchor_ids` to a CoT: the text is then found again."""
    tokenizer = KINDS[kind][0]()
    scale = ScoreScale.resolve(tokenizer, DIGITS)
    cot = tokenizer.encode("good good", add_special_tokens=False)
    ids = [*cot, *scale.anchor_ids]
    assert scale.cut(tokenizer, ids) == len(ids)
    assert scale.cut(tokenizer, [*ids, scale.score_ids[3]]) == len(ids)
    text = tokenizer.decode([*ids, scale.score_ids[3]])
    if kind in ("bytes", "llama3", "qwen", "mistral", "gpt2", "sentencepiece-joined"):
        assert text == "good good[RESULT] 4"


@pytest.mark.parametrize(
    ("scores", "values", "message"),
    [
        (["1"], None, "needs at least two scores"),
        (["1", "2", "2"], None, r"lists \['2'\] more than once"),
        (["1", " "], None, "empty text ' '"),
        (["1", "2", "A"], None, r"scores \['A'\] are not numbers while others are; give scale.values"),
        (["1", "2", "3"], [1.0, 2.0], "scale.values has 2 entries for 3 scores"),
        (["1", "2"], [1.0, float("nan")], "must be finite numbers"),
        (["1", "2"], [1.0, 1.0], "are not distinct"),
        (["1", "1.0"], None, "are not distinct"),
    ],
)
def test_scales_that_do_not_work_are_refused_with_the_fix(
    scores: list[str], values: list[float] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreScale.resolve(byte_level(), scores, values)


def test_nan_and_inf_are_words_not_values() -> None:
    tokenizer = byte_level(["Ġnan", "Ġinf"])
    assert ScoreScale.resolve(tokenizer, ["nan", "inf"]).values == [1.0, 2.0]


@pytest.mark.parametrize("anchor", ["", " ", "\n\n"])
def test_an_anchor_needs_a_visible_character(anchor: str) -> None:
    with pytest.raises(ConfigError, match="has no visible character"):
        ScoreScale.resolve(byte_level(), DIGITS, None, anchor)


def test_an_anchor_that_merges_whole_into_the_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match="have no common beginning with visible text"):
        ScoreScale.resolve(byte_level(["(A", "(B"], r"\S+"), ["A", "B"], None, "(")


def test_scores_that_the_vocabulary_lacks_or_folds_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"score '77' has the unknown token .*use score texts that its vocabulary has"
    ):
        ScoreScale.resolve(word_level(), ["1", "2", "77"])
    folded = Tokenizer(models.WordLevel({"<unk>": 0, "x:": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    folded.normalizer, folded.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer = wrap(folded, unk_token="<unk>")
    with pytest.raises(ConfigError, match="scores 'a' and 'A' are the same tokens .*tells apart"):
        ScoreScale.resolve(tokenizer, ["a", "b", "A"], [1, 2, 3], "X: ")
    assert ScoreScale.resolve(tokenizer, ["A", "B"], None, "X: ").anchor_text == "x:"


def test_cut_takes_the_first_anchor_in_any_tokenisation() -> None:
    tokenizer = qwen()
    scale = ScoreScale.resolve(tokenizer, DIGITS)
    first = tokenizer.encode("good. [RESULT] ", add_special_tokens=False)
    rest = tokenizer.encode("4 [RESULT] 5", add_special_tokens=False)
    assert scale.cut(tokenizer, first + rest) == len(first)
    letters = tokenizer.convert_tokens_to_ids(list("[RESULT]Ġ"))
    assert letters != scale.anchor_ids
    assert scale.cut(tokenizer, letters + rest) == len(letters)


def test_cut_is_none_without_an_anchor_or_where_a_token_extends_past_it() -> None:
    tokenizer = byte_level(["ĠĠ", "Ġ4"])
    scale = ScoreScale.resolve(byte_level(), DIGITS)
    assert scale.anchor_text == "[RESULT] "
    assert scale.cut(tokenizer, []) is None
    assert scale.cut(tokenizer, tokenizer.encode("good, [RESULT", add_special_tokens=False)) is None
    assert scale.cut(tokenizer, tokenizer.encode("[RESULT] 4", add_special_tokens=False)) is None
    double = [*tokenizer.encode("[RESULT]", add_special_tokens=False), tokenizer.convert_tokens_to_ids("ĠĠ")]
    assert scale.cut(tokenizer, double) is None
    # a later anchor that does end a token is the one
    space = tokenizer.convert_tokens_to_ids("Ġ")
    again = double + tokenizer.encode("[RESULT]", add_special_tokens=False) + [space]
    assert scale.cut(tokenizer, again) == len(again)


def by_definition(tokenizer: PreTrainedTokenizerFast, scale: ScoreScale, ids: list[int]) -> int | None:
    """What `cut` is, every length tried from the first."""

    def decoded(t: int) -> str:
        return tokenizer.decode(ids[:t], clean_up_tokenization_spaces=False)

    whole = decoded(len(ids))
    texts = ((t, decoded(t)) for t in range(1, len(ids) + 1))
    return next((t for t, text in texts if text.endswith(scale.anchor_text) and whole.startswith(text)), None)


EVERY_LENGTH = ["bytes", "qwen", "mistral", "sentencepiece-joined", "real_mistral_v3"]
if "LONG_TESTS" in os.environ:
    EVERY_LENGTH += [f"real_{name}" for name in NAMES if name != "mistral_v3"]


@pytest.mark.parametrize("anchor", ["[RESULT] ", "评分：", "é"])
@pytest.mark.parametrize("kind", EVERY_LENGTH)
def test_cut_agrees_with_trying_every_length(kind: str, anchor: str) -> None:
    """Random tokens, broken characters, special tokens and ids that decode to nothing, with an anchor somewhere or
    near the end, against the definition."""
    tokenizer = tokenizer_of(kind)
    scale = ScoreScale.resolve(tokenizer, DIGITS, None, anchor)
    pieces = [tokenizer.encode(c, add_special_tokens=False) for c in "字 é😀 good.评"]
    pieces += [piece[:-1] for piece in pieces if len(piece) > 1]
    pieces += [[token] for token in tokenizer.all_special_ids]
    pieces.append([10**6])  # models have more ids than their tokenizers; these decode to nothing
    rng = random.Random(f"{kind}{anchor}")

    def some(most: int) -> list[int]:
        return [token for _ in range(rng.randrange(most)) for token in rng.choice(pieces)]

    found, last = 0, Counter[int]()
    for _ in range(60):
        ids = some(8)
        if rng.random() < 0.8:
            ids += [*scale.anchor_ids, *some(8)[: rng.choice([0, 1, 2, 9])]]
        want = by_definition(tokenizer, scale, ids)
        assert scale.cut(tokenizer, ids) == want, (ids, tokenizer.decode(ids))
        found += want is not None
        last[len(ids) - (want or 0)] += 1
    assert 10 < found < 60 and all(last[distance] for distance in (0, 1, 2)) and max(last) > 3


def test_cut_decodes_few_prefixes() -> None:
    """One decode finds no anchor. Where generation stopped, at the anchor or behind the score, one prefix more and the
    one before it are enough; elsewhere a bisection costs a logarithmic number, not one per token."""
    tokenizer, calls = byte_level(), []

    class Counting:
        def decode(self, ids: list[int], **options: bool) -> str:
            calls.append(len(ids))
            return tokenizer.decode(ids, **options)

    scale = ScoreScale.resolve(tokenizer, DIGITS)
    cot = tokenizer.encode("a" * 2000, add_special_tokens=False)
    end = 2000 + len(scale.anchor_ids)
    for behind, decodes in ((0, 2), (1, 3), (2000, 20)):
        calls.clear()
        assert scale.cut(Counting(), [*cot, *scale.anchor_ids, *[scale.score_ids[0]] * behind]) == end
        assert len(calls) <= decodes
    calls.clear()
    assert scale.cut(Counting(), cot) is None and len(calls) == 1


def test_labels() -> None:
    scale = ScoreScale.resolve(byte_level(), DIGITS)
    assert [scale.label_index(y) for y in (1, 1.4, 1.5, 1.6, 4.9, 5)] == [0, 0, 0, 1, 4, 4]
