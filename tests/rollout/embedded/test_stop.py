"""Stop texts against plain decoding of every prefix."""

import random

import pytest
import torch

from real_megatron.rollout.embedded.stop import StopAutomaton, StopTexts, token_bytes
from tests.support import rollout_models

TOKENIZERS = {
    "byte_level": rollout_models.byte_level,
    "byte_fallback": rollout_models.byte_fallback,
    "word_level": rollout_models.word_level,
}


def first_hit(tokenizer, ids: list[int], stops: tuple[str, ...]) -> int | None:
    """The definition: number of tokens after which the decoded text holds a stop text for the first time."""
    # Decoded behind another token, because a text's own first token loses or gains a space.
    head = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode(head))
    for t in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(head + ids[:t])[start:] for stop in stops):
            return t
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("stops", [("[RESULT] ",), ("RESULT", "好"), ("aab",), ("] 1", " 5"), ("[RESULT] 9", "SUL")])
def test_finds_what_decoding_finds(kind, stops):
    tokenizer = TOKENIZERS[kind]()
    if kind == "word_level":
        stops = {"[RESULT] ": ("[RESULT] 1",), "aab": (" a a b",)}.get(stops[0], ("RESULT",))
    vocab = len(tokenizer)
    automaton = StopAutomaton(tokenizer, stops, vocab)
    rng = random.Random(0)
    rows = []
    likely = tokenizer.encode("a aab [RESULT] 1 [[RES[RESULT] 5 好 b " + " ".join(stops), add_special_tokens=False)
    ordinary = [i for i in range(vocab) if i not in tokenizer.all_special_ids]
    for _ in range(200):
        row = []
        while len(row) < 12:
            if rng.random() < 0.5:
                start = rng.randrange(len(likely))
                row += likely[start : start + rng.randrange(1, 8)]
            else:
                row.append(rng.choice(ordinary))
        rows.append(row[:12])
    criterion = StopTexts(automaton, len(rows))
    ids = torch.tensor(rows)
    for t in range(1, 13):
        criterion(ids[:, :t], None)
    hits = criterion.hits()
    found = [int(h.int().argmax()) + 1 if h.any() else None for h in hits]
    expected = [first_hit(tokenizer, row, stops) for row in rows]
    assert found == expected
    assert 5 < sum(e is not None for e in expected) < len(rows)


def test_partial_characters_keep_their_bytes():
    for build in (rollout_models.byte_level, rollout_models.byte_fallback):
        tokenizer = build()
        spellings = token_bytes(tokenizer)
        ids = tokenizer.encode("x 龘é", add_special_tokens=False)
        assert b"".join(spellings[i] for i in ids).decode().endswith("x 龘é")


def test_ids_beyond_the_tokenizer_change_nothing():
    tokenizer = rollout_models.word_level()
    automaton = StopAutomaton(tokenizer, ("b c",), len(tokenizer) + 7)
    b, c = tokenizer.convert_tokens_to_ids(["b", "c"])
    state = torch.zeros(1, dtype=torch.long)
    for token in (b, len(tokenizer) + 3, c):
        state = automaton.table[state, token].long()
    assert state.item() == automaton.accept


def test_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopAutomaton(rollout_models.word_level(), ("",), 9)
