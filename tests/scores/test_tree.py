"""Scores of several tokens: their tree by hand, and on tokenizers of every common kind."""

import os
from collections.abc import Sequence

import pytest

from real_megatron.config import ScaleConfig
from real_megatron.errors import ConfigError
from real_megatron.scores import Branch, ScoreScale, ScoreTree
from tests.support.real_tokenizers import NAMES
from tests.support.scale_tokenizers import TEN, byte_level, qwen, tokenizer_of, word_level

HALVES = ["1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
SCALES = {
    "1-10": TEN,
    "0-100": [str(k) for k in range(101)],
    "halves": HALVES,
    "signed": ["-2", "-1", "0", "1", "2"],
    "letters": ["A", "B", "C", "D", "E"],
    "words": ["poor", "fair", "good", "very good", "excellent"],
}
REAL = [f"real_{name}" for name in NAMES] if "LONG_TESTS" in os.environ else ["real_mistral_v3"]
SIZES = {
    # Branches and log-probs an answer asks for, of real tokenizers; Llama's have a token for each number up to 999.
    "1-10": ((2, 10), (1, 10)),
    "0-100": ((11, 101), (1, 101)),
    "halves": ((9, 13), (9, 13)),
    "signed": ((3, 7), (3, 7)),
    "letters": ((1, 5), (1, 5)),
    "words": ((2, 6), (2, 6)),
}


@pytest.mark.parametrize("scores", SCALES)
@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama3", "qwen", "mistral", "sentencepiece-joined", *REAL])
def test_the_tokenizers_own_tokens_are_read_as_the_score(kind: str, scores: str) -> None:
    """The tokenizer, asked in the middle of a text, agrees with anchor and tree, and `read` with what was written."""
    tokenizer, texts = tokenizer_of(kind), SCALES[scores]
    scale = ScoreScale.resolve(tokenizer, texts)
    ended = ScoreScale.resolve(tokenizer, texts, ends=["\n"])
    assert scale.anchor_text in ("[RESULT] ", "[RESULT]")
    newline = tokenizer.encode("1\n", add_special_tokens=False)[-1]
    other = tokenizer.encode("1x", add_special_tokens=False)[-1]
    paths = {branch.path for branch in scale.tree.branches}
    for k, text in enumerate(texts):
        row = tokenizer.encode(f"good\n[RESULT] {text}", add_special_tokens=False)
        begin = scale.cut(tokenizer, row)
        assert begin is not None and row[begin - len(scale.anchor_ids) : begin] == scale.anchor_ids
        path = row[begin:]
        assert tuple(path) == scale.tree.paths[k]
        goes_on = tuple(path) in paths
        assert scale.tree.could_go_on(k) == goes_on
        assert scale.tree.read([*path, other]) == scale.tree.read([*path, newline]) == (k, len(path) + goes_on)
        assert scale.tree.read(path) == ((None, len(path) + 1) if goes_on else (k, len(path)))
        assert ended.tree.read([*path, newline]) == (k, len(path) + goes_on)
        assert ended.tree.read([*path, other]) == (None if goes_on else k, len(path) + goes_on)
    prefixes = {path[:t] for path in scale.tree.paths for t in range(1, len(path) + 1)}
    assert scale.tree.width == len(prefixes), "one log-prob for each node of the tree but its root"
    assert scale.tree.size == len(texts)
    if kind.startswith("real_"):
        assert (len(scale.tree.branches), scale.tree.width) == SIZES[scores]["llama" in kind]


def test_a_tree_by_hand() -> None:
    """1, 10 and 2, with 1.5: tokens 1 → 10, 11; 0 → 20; "." → 30; 5 → 50; 2 → 40."""
    tree = ScoreTree([[[10]], [[10, 20]], [[10, 30, 50]], [[40]]])
    assert tree.branches == (Branch((), (10, 40)), Branch((10,), (20, 30)), Branch((10, 30), (50,)))
    assert (tree.size, tree.width, tree.flat, tree.most_tokens) == (4, 5, False, 3)
    assert tree.token_ids == [10, 20, 30, 40, 50]
    assert [tree.could_go_on(k) for k in range(4)] == [True, False, False, False]
    reads: list[tuple[Sequence[int], tuple[int | None, int]]] = [
        ([40, 7], (3, 1)),
        ([10, 7], (0, 2)),
        ([10, 20, 7], (1, 2)),
        ([10, 30, 50], (2, 3)),
        ([10, 30, 7], (None, 3)),  # "1." and then no 5
        ([7, 10], (None, 1)),
        ([], (None, 1)),
        ([10], (None, 2)),
        ([10, 30], (None, 3)),
    ]
    assert [tree.read(tokens) for tokens, _ in reads] == [said for _, said in reads]
    ended = ScoreTree([[[10]], [[10, 20]], [[40]]], ends=[7, 8])
    assert ended.branches == (Branch((), (10, 40)), Branch((10,), (20, 7, 8)))
    assert [ended.read([10, token])[0] for token in (7, 8, 9, 20)] == [0, 0, None, 1]
    assert ended.read([40, 9]) == (2, 1), "a score that cannot go on needs no end"


def test_most_tokens_is_that_of_the_score_which_is_decided_last() -> None:
    assert ScoreTree([[[1]], [[2]]]).most_tokens == 1
    assert ScoreTree([[[1]], [[1, 2]]]).most_tokens == 2
    assert ScoreTree([[[1]], [[1, 2, 3]], [[1, 2]]]).most_tokens == 3
    # The longest spelling of a score that goes on in its other spelling.
    assert ScoreTree([[[1], [1, 2, 3, 4]], [[5]]]).most_tokens == 4


def test_trees_are_equal_where_their_columns_are() -> None:
    a, same = ScoreTree([[[1], [2]], [[3]]], [4]), ScoreTree([[[1], [2]], [[3]]], [4])
    assert a == same and hash(a) == hash(same)
    assert a != ScoreTree([[[2], [1]], [[3]]], [4]), "the columns of its branches have another order"
    assert a != ScoreTree([[[1], [2]], [[3]]]) and a != ScoreTree([[[1]], [[3]]], [4]) and a != "tree"
    assert ScoreTree.of_tokens([5, 6]) == ScoreTree([[[5]], [[6]]])


@pytest.mark.parametrize(
    ("spellings", "ends", "message"),
    [
        ([[[1]], [[]]], [], r"spelling \[\] of score 1 is empty"),
        ([[[1, 2]], [[1, 2]]], [], r"spelling \[1, 2\] of score 1 .* not the only one"),
        ([[[1]], [[1, 2]]], [3, 2], r"token 2 ends the score \[1\] and continues it"),
    ],
)
def test_trees_that_are_ambiguous_are_bugs(spellings: list[list[list[int]]], ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreTree(spellings, ends)


def test_spellings_are_ways_to_write_one_score() -> None:
    tokenizer = qwen()
    config = ScaleConfig(scores=["4", "5"], anchor="[RESULT]", spellings={"5": ["5.0", " 5", "five"], "4": [" 4"]})
    scale = ScoreScale.of(tokenizer, config)
    assert scale.values == [4, 5] and len(scale.tree.paths) == 2
    for text, score in [("4", 0), (" 4", 0), ("5.0", 1), (" 5", 1), ("five", 1), ("5!", 1)]:
        tokens = tokenizer.encode(f"[RESULT]{text}", add_special_tokens=False)[len(scale.anchor_ids) :]
        assert scale.tree.read(tokens)[0] == score, text
    assert tokenizer.decode(list(scale.tree.paths[1])) == "5", "targets are written in the first spelling"
    with pytest.raises(ValueError, match="are not one token each"):
        _ = scale.score_ids
    # This one has no spaces: two spellings are the same tokens, which is no harm within a score.
    words = ScoreScale.resolve(word_level(), ["4", "5"], spellings={"4": [" 4"]})
    assert words.tree.flat and words.tree == ScoreTree([[[id]] for id in words.score_ids])


def test_scores_that_share_tokens_behind_the_anchor() -> None:
    """The "1" that 10, 11 and 12 share is not the anchor's: where a response stops it has not been written."""
    scale = ScoreScale.resolve(qwen(), ["10", "11", "12"])
    assert scale.anchor_text == "[RESULT] "
    assert [branch.path for branch in scale.tree.branches] == [(), (scale.tree.paths[0][0],)]
    assert not any(scale.tree.could_go_on(k) for k in range(3))
    broken = ScoreScale.resolve(byte_level(), ["é", "è"])
    assert broken.anchor_text == "[RESULT] " and broken.tree.most_tokens == 2


def test_ends_are_texts_and_the_end_of_sequence() -> None:
    tokenizer = qwen()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    scale = ScoreScale.of(tokenizer, ScaleConfig(scores=TEN, ends=["eos", "\n", "</score>"]))
    assert tokenizer.convert_ids_to_tokens(list(scale.tree.ends)) == ["<eos>", "Ċ", "<"]
    # A special token may be named by its text; where no score begins another there is nothing to end.
    assert ScoreScale.resolve(tokenizer, TEN, ends=["<eos>"]).tree.ends == (tokenizer.eos_token_id,)
    assert ScoreScale.resolve(tokenizer, list("12345"), ends=["eos"]).tree.ends == ()


@pytest.mark.parametrize(
    ("spellings", "ends", "message"),
    [
        ({"6": ["six"]}, [], r"scale.spellings names '6', which is no score; give spellings of \['1', '10'"),
        ({"1": [" "]}, [], "scale.spellings holds an empty text ' '; each spelling needs"),
        ({"1": ["one"], "10": ["one"]}, [], "scale.spellings: 'one' is given twice; give each text to one score"),
        ({"1": ["1"]}, [], "scale.spellings: '1' is given twice"),
        ({}, [""], "scale.ends: '' is no token of its own behind the score '1': .*; name a text"),
        ({}, ["eos"], "scale.ends: this tokenizer has no end of sequence; name the text"),
        ({}, ["\n", "."], r"scale.ends: '.' begins with the token '.', which continues the score '1' to another"),
        ({}, ["th"], "scale.ends: 'th' is no token of its own behind the score '1': .*'1th'"),
    ],
)  # fmt: skip
def test_spellings_and_ends_that_do_not_work_are_refused_with_the_fix(
    spellings: dict[str, list[str]], ends: list[str], message: str
) -> None:
    tokenizer = byte_level(["1th"], r"\S+|\s")
    with pytest.raises(ConfigError, match=message):
        ScoreScale.resolve(tokenizer, ["1", "10", "15", "1.5"], None, "[RESULT] ", spellings, ends)
