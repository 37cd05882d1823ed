"""Readings and critiques come to rank 0 alone, in gloo worlds; the other ranks get the numbers.

Evaluations are compared as texts, which hold every digit: so few examples have no intervals, and NaN equals nothing.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from real_megatron.judging.kept import KeptReadings
from tests.support import judging_ranks as ranks
from tests.support.ranks import run_ranks
from tests.support.rollout_ranks import DRAWN_PARAMS, Drawn

RESPONSES = len(ranks.EXAMPLES) * DRAWN_PARAMS.n


@pytest.mark.parametrize("owned", [False, True], ids=["embedded", "servers"])
def test_ranks_evaluate_as_one_rank(owned: bool, tmp_path: Path) -> None:
    alone, told = ranks.evaluated(Drawn())
    assert alone.counts["forced"] and alone.counts["responses"] == RESPONSES and told == [2, 3]
    for world in (2, 4):
        path = tmp_path / f"{world}.jsonl"
        (first, *counted), *others = run_ranks(world, ranks.shared, owned, path)
        assert repr(first) == repr(alone) and len(KeptReadings(path, {}).begin()) == 3
        assert all(repr(result) == repr(replace(alone, predictions=[])) for result, *_ in others)
        assert all(done == told for done, *_ in [counted, *(rest for _, *rest in others)])
        assert sum(cuts for _, cuts, _ in [counted, *(rest for _, *rest in others)]) == RESPONSES
        assert (counted[2]["received"] == 0) == owned
        assert all(count["received"] == 0 for *_, count in others)
        assert all(count["header"] < 200 for *_, count in [counted, *others])


def test_ranks_go_on_behind_what_rank_0_has_kept(tmp_path: Path) -> None:
    """An evaluation that was stopped behind its first batch: nothing of that is judged again, nor sent."""
    path = tmp_path / "kept.jsonl"
    run_ranks(2, ranks.shared, False, path)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    (first, told, cuts, count), (other, also_told, further, nothing) = run_ranks(2, ranks.shared, False, path)
    alone, _ = ranks.evaluated(Drawn())
    assert repr(first) == repr(alone) and repr(other) == repr(replace(alone, predictions=[]))
    assert told == also_told == [3] and cuts + further == DRAWN_PARAMS.n
    assert count["received"] == nothing["received"] == 0  # rank 0 has judged the one example itself


@pytest.mark.parametrize("owned", [False, True], ids=["embedded", "servers"])
def test_critiques_come_to_rank_0_alone(owned: bool) -> None:
    (alone,) = run_ranks(1, ranks.critiques, False)
    assert sum(map(len, alone)) and all("[RESULT]" not in text for row in alone for text in row)
    assert run_ranks(2, ranks.critiques, owned) == [alone, []]
