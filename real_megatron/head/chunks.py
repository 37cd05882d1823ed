"""How the linear form divides its work into chunks so that its buffers fit a byte budget."""

from typing import NamedTuple

# Rows are split rather than making chunks narrower than this, unless chunks would have fewer rows than that too.
WIDE_COLUMNS = 2048
# GEMMs of narrower chunks are inefficient, so a budget too small for this width is an error.
MIN_COLUMNS = 128


class Chunks(NamedTuple):
    """Chunks of `rows` rows × `columns` vocabulary columns; the logits of one chunk exist at a time."""

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

    Chunks have all rows if possible, since each row of the weight gradient is then read and written once; rows are
    split only where chunks of all rows would be too narrow. With preferred_bytes, chunks of logits larger than that
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
    row_chunks = -(-rows // min(rows, fit_rows)) if rows else 1
    chunk_rows = -(-rows // row_chunks)
    fit_columns = (budget - chunk_rows * bytes_per_row) // max(chunk_rows * bytes_per_logit + bytes_per_column, 1)
    if preferred_bytes is not None:
        fit_columns = min(fit_columns, preferred_bytes // max(chunk_rows * bytes_per_logit, 1))
    if fit_columns >= columns:
        return Chunks(chunk_rows, columns)
    return Chunks(chunk_rows, max(min(MIN_COLUMNS, columns), fit_columns // MIN_COLUMNS * MIN_COLUMNS))
