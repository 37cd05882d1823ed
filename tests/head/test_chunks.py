"""Chunks fit the byte budget, cover everything, and have all rows where possible."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from real_megatron.head.chunks import MIN_COLUMNS, Chunks, plan_chunks

MIB = 1 << 20


@settings(deadline=None)
@given(
    rows=st.integers(0, 100_000),
    columns=st.integers(0, 300_000),
    per_logit=st.sampled_from([2, 4, 6, 8]),
    per_row=st.sampled_from([0, 1024, 65_536]),
    per_column=st.sampled_from([0, 4096]),
    budget=st.integers(1, 1 << 30),
    preferred=st.sampled_from([None, 1 * MIB, 64 * MIB]),
)
def test_chunks_fit_the_budget(
    rows: int, columns: int, per_logit: int, per_row: int, per_column: int, budget: int, preferred: int | None
) -> None:
    one_row = min(MIN_COLUMNS, max(columns, 1)) * (per_logit + per_column) + per_row
    if budget < one_row:
        with pytest.raises(ValueError, match=f"give it at least {one_row}"):
            plan_chunks(rows, columns, per_logit, per_row, per_column, budget, preferred)
        return
    chunks = plan_chunks(rows, columns, per_logit, per_row, per_column, budget, preferred)
    assume(rows and columns)
    assert 1 <= chunks.rows <= rows and 1 <= chunks.columns <= columns
    cost = chunks.rows * chunks.columns * per_logit + chunks.rows * per_row + chunks.columns * per_column
    assert cost <= budget


def test_rows_stay_whole_while_they_can() -> None:
    # Qwen3's vocabulary, 8,192 rows, bf16, H = 4096: 128 MiB hold the float32 sums, the rest the logits.
    assert plan_chunks(8192, 151_936, 2, 4 * 4096, 0, 256 * MIB) == Chunks(8192, 8192)
    # 64k rows of sums alone would burst the budget: rows are split, and chunks stay wide.
    split = plan_chunks(65_536, 151_936, 2, 4 * 4096, 0, 256 * MIB)
    assert split.rows < 65_536 and split.columns >= 2048


def test_a_preferred_size_narrows_columns_not_rows() -> None:
    assert plan_chunks(2048, 32_768, 4, 0, 0, 256 * MIB, 16 * MIB) == Chunks(2048, 2048)
    tall = plan_chunks(200_000, 32_768, 4, 0, 0, 256 * MIB, 16 * MIB)
    assert tall == Chunks(plan_chunks(200_000, 32_768, 4, 0, 0, 256 * MIB).rows, MIN_COLUMNS)
