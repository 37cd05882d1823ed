"""How the linear form cuts its work so that its buffers stay inside a byte budget."""

from typing import NamedTuple

# Rows are split rather than making chunks narrower than WIDE_COLUMNS, unless the blocks would be lower than that too.
WIDE_COLUMNS = 2048
# A chunk narrower than this wastes the GEMM; a budget too small for it is an error, not a crawl.
MIN_COLUMNS = 128


class Chunks(NamedTuple):
    """Blocks of `rows` rows × chunks of `columns` vocabulary columns; the logits of one exist at a time."""

    rows: int
    columns: int


def plan_chunks(
    rows: int,
    columns: int,
    bytes_per_logit: int,
    bytes_per_row: int,
    bytes_per_column: int,
    budget: int,
    preferred_bytes: int | None = None,
) -> Chunks:
    """The widest chunks that fit:
    rows·columns·bytes_per_logit + rows·bytes_per_row + columns·bytes_per_column ≤ budget.

    Vocabulary chunks over all rows come first, since each slice of the weight gradient is then touched once; rows are
    split only where chunks of all rows would become too narrow. With preferred_bytes, chunks of logits larger than that
    are not used even where they fit. ValueError if the budget cannot hold one row of MIN_COLUMNS columns.
    """
    for width in (WIDE_COLUMNS, MIN_COLUMNS):
        narrow = min(width, max(columns, 1))
        fit_rows = (budget - narrow * bytes_per_column) // (narrow * bytes_per_logit + bytes_per_row)
        if fit_rows >= max(1, min(rows, WIDE_COLUMNS)):
            break
    if fit_rows < 1:
        needed = narrow * (bytes_per_logit + bytes_per_column) + bytes_per_row
        raise ValueError(f"memory_budget_bytes={budget} cannot hold one row of a chunk: give it at least {needed}")
    blocks = -(-rows // min(rows, fit_rows)) if rows else 1
    block_rows = -(-rows // blocks)
    fit_columns = (budget - block_rows * bytes_per_row) // max(block_rows * bytes_per_logit + bytes_per_column, 1)
    if preferred_bytes is not None:
        fit_columns = min(fit_columns, preferred_bytes // max(block_rows * bytes_per_logit, 1))
    if fit_columns >= columns:
        return Chunks(block_rows, columns)
    return Chunks(block_rows, max(min(MIN_COLUMNS, columns), fit_columns // MIN_COLUMNS * MIN_COLUMNS))
