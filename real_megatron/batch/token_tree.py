"""A group's tokens as a micro-batch holds them: each distinct beginning once, and which tokens the head's rows are."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, compress

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.types import Group, Trajectory
from real_megatron.scores import ScoreTree

LEAST_SHARED = 16
"""Responses that begin alike for fewer tokens are apart. A shared beginning is one more segment, which costs attention
about as much as some tokens cost the model; and most critiques begin with the same few words."""


class _Node:
    """A segment while the tree grows."""

    __slots__ = ("children", "start", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.children: dict[int, _Node] = {}
        """What goes on from its end, by the first token, in order of first use."""
        self.start = 0
        """Where its tokens begin in the group's."""

    def insert(self, offset: int, ids: list[int]) -> int:
        """Let `ids` follow the first `offset` tokens of this node; how many of them were not there yet."""
        node, t = self, 0
        while True:
            same = _alike(node.tokens, offset, ids, t)
            offset, t = offset + same, t + same
            if t == len(ids):
                return 0
            if offset < len(node.tokens):
                rest = _Node(node.tokens[offset:])
                rest.children, node.children = node.children, {rest.tokens[0]: rest}
                node.tokens = node.tokens[:offset]
            following = node.children.get(ids[t])
            if following is None:
                node.children[ids[t]] = _Node(ids[t:])
                return len(ids) - t
            node, offset = following, 0

    def along(self, offset: int, ids: Sequence[int]) -> Iterator[tuple["_Node", int, int]]:
        """Where `ids` are that follow the first `offset` tokens of this node: (node, begin and end in its tokens)."""
        node, t = self, 0
        while t < len(ids):
            if offset == len(node.tokens):
                node, offset = node.children[ids[t]], 0
            end = min(len(node.tokens), offset + len(ids) - t)
            yield node, offset, end
            t, offset = t + end - offset, end


class TokenTree:
    """The tokens of one group as segments, and the tokens at which the output head is asked.

    scores: the tree whose branches are asked for behind each answer position
    share_prompt: the prompt is the root. Responses that begin alike for `LEAST_SHARED` tokens or more share that
        beginning, equal ones everything. A branch's path goes on at the answer position, on the response's own tokens
        as far as they are the same. Segments are in depth-first order, those that continue one in order of first use.
        Without, each response is a whole sequence with the prompt, and so is each branch of it: nothing is shared.
    """

    def __init__(self, group: Group, scores: ScoreTree, share_prompt: bool = True) -> None:
        self.group = group
        self._paths = [list(branch.path) for branch in scores.branches]
        self._shared = share_prompt
        self._begins: list[_Node] = []
        """Per trajectory the node in which its response begins; where nothing is shared, its whole sequence."""
        self._alone: list[list[_Node]] = []
        """Per trajectory the whole sequences of its branches that have a path, where nothing is shared."""
        self.repeated = 0
        """Response tokens that are not run again, since another response has them too."""
        self.lengths: list[int] = []
        """Tokens of each segment."""
        self.parents: list[int | None] = []
        """Segment that each one continues."""
        self._nodes: list[_Node] = []
        self.total = 0
        """Tokens of all segments."""
        if share_prompt:
            self._grow()
        else:
            self._set_apart()

    def _grow(self) -> None:
        beginnings: dict[tuple[int, ...], _Node] = {}
        for trajectory in self.group.trajectories:
            ids = trajectory.response_ids
            if not ids:
                self._begins.append(_Node([]))
                continue
            # Shorter than that it is found by equal ones alone.
            node = beginnings.get(key := tuple(ids[:LEAST_SHARED]))
            if node is None:
                node = beginnings[key] = _Node(ids)
            else:
                self.repeated += len(ids) - node.insert(0, ids)
            self._begins.append(node)
            if trajectory.answer_index is not None and any(self._paths):
                *_, (answer, _, end) = node.along(0, ids[: trajectory.answer_index + 1])
                for path in filter(None, self._paths):
                    answer.insert(end, path)
        self._number(_Node(self.group.prompt_ids), None)
        # Not by recursion: a tree may be as deep as a response is long.
        waiting = [(node, 0) for node in reversed(beginnings.values())]
        while waiting:
            node, parent = waiting.pop()
            index = self._number(node, parent)
            waiting += [(child, index) for child in reversed(node.children.values())]

    def _set_apart(self) -> None:
        prompt = self.group.prompt_ids
        for trajectory in self.group.trajectories:
            ids = trajectory.response_ids
            self._begins.append(_Node(prompt + ids))
            self._number(self._begins[-1], None)
            paths = filter(None, self._paths) if trajectory.answer_index is not None else []
            self._alone.append([_Node(prompt + _answered(trajectory) + path) for path in paths])
            for node in self._alone[-1]:
                self._number(node, None)

    def _number(self, node: _Node, parent: int | None) -> int:
        node.start = self.total
        self.total += len(node.tokens)
        self._nodes.append(node)
        self.lengths.append(len(node.tokens))
        self.parents.append(parent)
        return len(self._nodes) - 1

    @cached_property
    def segments(self) -> SegmentTree:
        """The segments, with their parents."""
        return SegmentTree(tuple(map(Segment, self.lengths, self.parents)))

    @property
    def tokens(self) -> list[int]:
        """Token ids of all segments, `[total]`."""
        return list(chain.from_iterable(node.tokens for node in self._nodes))

    @cached_property
    def rows(self) -> int:
        """Rows that reach the output head: loss-carrying tokens, and the branches of each answer."""
        trajectories = self.group.trajectories
        answers = sum(t.answer_index is not None for t in trajectories)
        return sum(sum(t.loss_mask) for t in trajectories) + answers * len(self._paths)

    def token_rows(self, first: int = 0) -> list[list[int]]:
        """Per trajectory, of each of its loss-carrying tokens the token before it, which predicts it. `first`: where
        the group's tokens begin."""
        prompt = len(self.group.prompt_ids)
        rows = []
        for trajectory, node in zip(self.group.trajectories, self._begins, strict=True):
            before = first + prompt - 1 + (0 if self._shared else node.start)
            pieces = self._along_response(trajectory, node)
            own = (range(first + part.start + begin, first + part.start + end) for part, begin, end in pieces)
            # One more than there are: the last token of a response predicts none of it.
            rows.append(list(compress(chain((before,), *own), trajectory.loss_mask)))
        return rows

    def answer_rows(self, first: int = 0) -> list[list[int]]:
        """Per trajectory the token of each branch, in the score tree's order; none without an answer. `first`: as of
        `token_rows`."""
        rows: list[list[int]] = []
        for k, (trajectory, node) in enumerate(zip(self.group.trajectories, self._begins, strict=True)):
            if trajectory.answer_index is None:
                rows.append([])
                continue
            *_, (answer, _, end) = self._along_response(trajectory, node, trajectory.answer_index + 1)
            alone = iter([] if self._shared else self._alone[k])
            row = []
            for path in self._paths:
                last, behind = answer, end
                if path and self._shared:
                    *_, (last, _, behind) = answer.along(end, path)
                elif path:
                    last = next(alone)
                    behind = len(last.tokens)
                row.append(first + last.start + behind - 1)
            rows.append(row)
        return rows

    def _along_response(
        self, trajectory: Trajectory, node: _Node, count: int | None = None
    ) -> Iterator[tuple[_Node, int, int]]:
        """Where the response's tokens are, or its first `count`."""
        return node.along(0 if self._shared else len(self.group.prompt_ids), trajectory.response_ids[:count])


def branch_tokens(scores: ScoreTree) -> int:
    """Tokens that the branches add to a response that ends at its answer position."""
    return TokenTree(Group([0], [Trajectory([0], 0)], 0.0), scores).total - 2


def _answered(trajectory: Trajectory) -> list[int]:
    assert trajectory.answer_index is not None
    return trajectory.response_ids[: trajectory.answer_index + 1]


def _alike(a: list[int], i: int, b: list[int], j: int) -> int:
    """How many tokens of a[i:] and b[j:] are the same, from the first on. By slices: responses are long."""
    most = min(len(a) - i, len(b) - j)
    if a[i : i + most] == b[j : j + most]:
        return most
    return bisect_right(range(1, most), False, key=lambda n: a[i : i + n] != b[j : j + n])
