"""GatherRows: what it means, and that malformed lists are refused."""

import pytest
import torch

from real_megatron.head import GatherRows


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_rows_from_lists() -> None:
    rows = GatherRows.from_lists([[5, 3], [], [3]])
    assert rows.ids.tolist() == [5, 3, 3]
    assert rows.offsets.tolist() == [0, 2, 2, 3]
    assert rows.row_index.tolist() == [0, 0, 2]
    assert (rows.num_rows, rows.nnz, rows.id_range) == (3, 3, (3, 5))


def test_one_id_per_row() -> None:
    rows = GatherRows.one_per_row(ints(7, 0))
    assert rows.offsets.tolist() == [0, 1, 2] and rows.row_index.tolist() == [0, 1]


def test_slice_is_the_rows_in_between() -> None:
    rows = GatherRows.from_lists([[1], [2, 3], [], [4]]).slice(1, 3)
    assert rows.ids.tolist() == [2, 3] and rows.offsets.tolist() == [0, 2, 2]


def test_empty() -> None:
    rows = GatherRows.from_lists([])
    assert (rows.num_rows, rows.nnz) == (0, 0) and rows.row_index.tolist() == []


def test_moved_rows_keep_their_checks() -> None:
    moved = GatherRows.from_lists([[4], [9]]).to("meta")
    assert moved.device.type == "meta" and moved.id_range == (4, 9)


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        (ints(1).int(), ints(0, 1), r"ids must be a 1-D int64 tensor, got torch.int32"),
        (ints(1), ints(0, 1).view(1, 2), r"offsets must be a 1-D int64 tensor"),
        (ints(1), ints(), "at least one"),
        (ints(1, 2), ints(0, 1), r"ascend from 0 to len\(ids\) = 2, got 0 … 1"),
        (ints(1, 2), ints(1, 2), "ascend from 0"),
        (ints(1, 2), ints(0, 2, 1, 2), "ascend"),
        (ints(1).to("meta"), ints(0, 1), "use one device"),
    ],
)
def test_malformed_lists_are_refused(ids: torch.Tensor, offsets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatherRows(ids, offsets)
