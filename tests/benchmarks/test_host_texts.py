"""The benchmark of a step's texts, at a small size: it compares what both ways give by itself."""

from benchmarks.host.texts import rows


def test_both_ways_give_the_same_and_no_rank_count_changes_them() -> None:
    few, many = rows(2, responses=16, tokens=40), rows(32, responses=16, tokens=40)
    ways = [(row.part, row.variant) for row in few]
    assert ways == [
        (part, variant)
        for part in ("reading replies", "finding the score (cut)", "distinct n-grams")
        for variant in ("before", "after")
    ]
    assert all(row.seconds and row.seconds > 0 for row in few)
    assert [(row.ranks, row.seconds, row.how) for row in many] == [(32, row.seconds, "counted") for row in few]
