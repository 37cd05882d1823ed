"""Scores as a prefix tree of token ids: what a model is asked for behind the anchor, and what a response says there.

A score's text is one token or several, and may be written in more than one way (its spellings). The tokens of all
spellings form a tree whose root is the anchor's end. An inner node of it, a branch, asks for the log-probs of the
tokens that go on from there. The log-prob of a spelling is the sum along its path.

A spelling that is the beginning of another (`1` of `10`) also needs that the score ends there. Either one of the tokens
`ends` follows it, or, without `ends`, any token that does not go on to another score. Both make the spellings
exclusive events of what the model writes behind the anchor, so that their probabilities add up to at most one.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """An inner node of a score tree."""

    path: tuple[int, ...]
    """Token ids between the anchor and this node; none at the root."""
    ids: tuple[int, ...]
    """Token ids whose log-probs are asked for behind it: those of its children, then the ends where one is needed."""


@dataclass(frozen=True)
class Spelling:
    """One way to write a score, as places among the log-probs that the tree's branches ask for."""

    score: int
    """Index of the score."""
    steps: tuple[int, ...]
    """Place of each token's log-prob, counted over all branches in order."""
    rest: tuple[int, ...] = ()
    """Places of the tokens that must not follow; none where an end is among the steps, or nothing can follow."""


class ScoreTree:
    """The prefix tree of a scale's spellings.

    spellings: per score its spellings as token ids, the first of them the one that supervised targets have
    ends: token ids, one of which must follow a spelling that is the beginning of another; without any, every token
        that does not go on to another score ends it

    Raises ValueError for spellings that are empty or not distinct, and for an end that also continues a score.
    """

    def __init__(self, spellings: Sequence[Sequence[Sequence[int]]], ends: Sequence[int] = ()) -> None:
        self.paths = [tuple(own[0]) for own in spellings]
        """Token ids of each score's first spelling."""
        self.ends = tuple(ends)
        score_of: dict[tuple[int, ...], int] = {}
        children: dict[tuple[int, ...], list[int]] = {(): []}
        for score, own in enumerate(spellings):
            for path in map(tuple, own):
                if not path or path in score_of:
                    raise ValueError(f"spelling {list(path)} of score {score} is empty or not the only one")
                score_of[path] = score
                for t, token in enumerate(path):
                    following = children.setdefault(path[:t], [])
                    if token not in following:
                        following.append(token)
        self._score_of, self._children = score_of, children
        branches, place = [], {}
        count = 0
        # Parents before their children; the root first.
        for path in sorted(children, key=len):
            ids = list(children[path])
            if path in score_of and ends:
                if both := set(ids) & set(ends):
                    raise ValueError(f"token {min(both)} ends the score {list(path)} and continues it to another")
                ids += ends
            branches.append(Branch(path, tuple(ids)))
            for token in ids:
                place[path, token] = count
                count += 1
        self.branches = tuple(branches)
        """The inner nodes, the root first and parents before their children."""
        self.width = count
        """How many log-probs an answer asks for: those of all branches."""
        found = []
        for path, score in score_of.items():
            steps = tuple(place[path[:t], path[t]] for t in range(len(path)))
            if path not in children:
                found.append(Spelling(score, steps))
            elif ends:
                found += [Spelling(score, (*steps, place[path, end])) for end in ends]
            else:
                found.append(Spelling(score, steps, tuple(place[path, token] for token in children[path])))
        self.spellings = tuple(sorted(found, key=lambda spelling: spelling.score))
        """Every way to write a score, by score."""
        self.most_tokens = max((len(path) + (path in children) for path in score_of), default=0)
        """How many tokens behind the anchor decide a score, at most."""

    @classmethod
    def joined(cls, trees: Sequence["ScoreTree"], given: Sequence[Sequence[int]]) -> "ScoreTree":
        """The scores of several aspects as one tree, those of the first aspect first.

        given: per aspect the tokens before its score, its own anchor. They are put there, not asked for: log-probs
            are those of the score behind them
        """
        joined = cls.__new__(cls)
        joined.paths, joined.ends = [], tuple(end for tree in trees for end in tree.ends)
        branches, spellings, width = [], [], 0
        for tree, before in zip(trees, map(tuple, given), strict=True):
            branches += [Branch(before + branch.path, branch.ids) for branch in tree.branches]
            spellings += [
                Spelling(
                    len(joined.paths) + spelling.score,
                    tuple(width + step for step in spelling.steps),
                    tuple(width + step for step in spelling.rest),
                )
                for spelling in tree.spellings
            ]
            joined.paths += [before + path for path in tree.paths]
            width += tree.width
        joined.branches, joined.spellings, joined.width = tuple(branches), tuple(spellings), width
        joined.most_tokens = max(len(before) + tree.most_tokens for tree, before in zip(trees, given, strict=True))
        joined._score_of, joined._children = {}, {(): []}
        return joined

    @classmethod
    def of_tokens(cls, ids: Sequence[int]) -> "ScoreTree":
        """The tree of scores that are one token each."""
        return cls([[[id]] for id in ids])

    @property
    def size(self) -> int:
        """Number of scores."""
        return len(self.paths)

    @property
    def flat(self) -> bool:
        """Whether every spelling is one token, so that one distribution behind the anchor says everything."""
        return len(self.branches) == 1 and not self.branches[0].path

    @property
    def direct(self) -> bool:
        """Whether every score is one token, in one way, so that what an answer asks for is the scores themselves."""
        return self.flat and self.size == self.width

    def could_go_on(self, score: int) -> bool:
        """Whether the score's first spelling is the beginning of another spelling, so that what follows it decides."""
        return self.paths[score] in self._children

    @property
    def token_ids(self) -> list[int]:
        """Every token id of the tree, ends and what is given included, ascending."""
        return sorted({id for branch in self.branches for id in (*branch.path, *branch.ids)})

    def read(self, tokens: Sequence[int]) -> tuple[int | None, int]:
        """What the tokens behind an anchor say: (index of the score, or None where they say none; how many of the
        tokens decide that).

        The token that ends a score which could go on counts among them. Where the tokens are over before anything is
        decided the score is None, and the number one more than there are tokens.

        Not of joined trees: their scores are not alternatives.
        """
        path: tuple[int, ...] = ()
        for t, token in enumerate(tokens):
            if token in self._children[path]:
                path = (*path, token)
                if path not in self._children:
                    return self._score_of[path], t + 1
            else:
                ended = path in self._score_of and (not self.ends or token in self.ends)
                return self._score_of[path] if ended else None, t + 1
        return None, len(tokens) + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreTree):
            return NotImplemented
        # In order: branches, and with them the columns of what an answer asks for, are in the order of the spellings.
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.branches, self.spellings, self.ends
