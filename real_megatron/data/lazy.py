"""Sequences that make an item when it is asked for."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T], ABC):
    """A sequence that holds no items: each is made anew, equal to the last time. A slice is a list."""

    @abstractmethod
    def _make(self, index: int) -> T:
        """The item at `index`, which is between 0 and the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self)))]
        return self._make(range(len(self))[index])  # as a list: from the end, and IndexError beyond it


class TokenRows(LazySequence[list[int]]):
    """Rows of token ids, as int32 in one array: lists of Python take nine times as much memory."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])

    def append(self, ids: Iterable[int]) -> None:
        """Add a row."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _make(self, index: int) -> list[int]:
        return self._ids[self._ends[index] : self._ends[index + 1]].tolist()
