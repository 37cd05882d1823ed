"""Every row of a packed micro-batch against the plain definition: the whole text that it reads, and what it asks."""

import random

import pytest
import torch

from real_megatron.batch.packing import PackedMicrobatch, pack, rows_of, sampled_scores, tokens_of, tree_of
from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.token_tree import LEAST_SHARED, TokenTree, branch_tokens
from real_megatron.batch.types import Group, Trajectory
from real_megatron.scores import ScoreTree


def digits(number: int) -> list[int]:
    return [int(digit) for digit in str(number)]


END = 90
TREES = {
    "one digit": ScoreTree.of_tokens([1, 2, 3]),
    "1 to 10": ScoreTree([[digits(k)] for k in range(1, 11)]),
    "0 to 100 with an end": ScoreTree([[digits(k)] for k in range(101)], ends=[END]),
    "two aspects": ScoreTree.joined([ScoreTree.of_tokens([1, 2]), ScoreTree([[[1]], [[1, 0]]])], [[30], [31, 30]]),
}


def random_groups(seed: int) -> list[Group]:
    """Responses of three kinds of tokens, many of which begin alike, for fewer tokens than are shared or for more;
    equal ones; some with a sampled or supervised score; some without an answer; an empty one."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(3) for _ in range(rng.randint(low, high))]

    groups = []
    for g in range(3):
        trajectories = [Trajectory([], None)]
        for _ in range(7):
            before = rng.choice(trajectories).response_ids
            ids = before[: rng.randint(0, len(before))] + draw(0, 30)
            answer = None
            if ids and rng.random() < 0.8:
                answer = rng.randrange(max(0, len(ids) - 3), len(ids))
                ids = ids[: answer + 1] + rng.choice([[], digits(rng.randint(0, 100)), [1, END], [END], [5, 7]])
            mask = [rng.random() < 0.9 for _ in ids]
            trajectories += [Trajectory(ids, answer, mask)] * rng.choice([1, 1, 2])
        groups.append(Group([50 + g, *draw(1, 9)], trajectories, label=1.0))
    return groups


def texts(packed: PackedMicrobatch) -> list[tuple[int, ...]]:
    """The tokens that each packed token sees, itself included, by walking up the segment tree."""
    tree, found = packed.tree, []
    for i, (start, length) in enumerate(zip(tree.starts, tree.lengths, strict=True)):
        above = [t for a in tree.ancestors(i) for t in range(tree.starts[a], tree.starts[a] + tree.lengths[a])]
        found += [tuple(packed.tokens[[*above, *range(start, t + 1)]].tolist()) for t in range(start, start + length)]
    return found


def expected_rows(groups: list[Group], scores: ScoreTree) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(text up to and including the row, ids asked) of all loss-carrying tokens, then of all answers' branches."""
    tokens, branches = [], []
    for group in groups:
        start = len(group.prompt_ids)
        for t in group.trajectories:
            whole = tuple(group.prompt_ids + t.response_ids)
            tokens += [(whole[: start + i], (whole[start + i],)) for i, keep in enumerate(t.loss_mask) if keep]
            if t.answer_index is not None:
                answered = whole[: start + t.answer_index + 1]
                branches += [(answered + branch.path, branch.ids) for branch in scores.branches]
    return tokens + branches


def distinct_tokens(group: Group, scores: ScoreTree) -> int:
    """How many different texts end at a token of the group, where responses that begin alike for fewer than
    LEAST_SHARED tokens count as different, unless they are equal."""
    found = set()
    for t in group.trajectories:
        ids = tuple(t.response_ids)
        paths = [] if t.answer_index is None else [b.path for b in scores.branches]
        for whole in [ids, *(ids[: (t.answer_index or 0) + 1] + path for path in paths)]:
            found |= {(ids[:LEAST_SHARED], whole[: i + 1]) for i in range(len(whole))}
    return len(group.prompt_ids) + len(found)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("scores", TREES.values(), ids=TREES)
def test_rows_read_the_texts_that_predict_them(scores: ScoreTree, share_prompt: bool) -> None:
    repeated = 0
    for seed in range(6):
        groups = random_groups(seed)
        packed = pack(groups, scores, share_prompt, multiple=8)
        seen = texts(packed)
        asked = packed.ids.split(packed.offsets.diff().tolist())
        rows = [
            (seen[position], tuple(ids.tolist()))
            for position, ids in zip(packed.row_positions.tolist(), asked, strict=True)
        ]
        assert rows == expected_rows(groups, scores)
        assert sum(rows_of(group, scores) for group in groups) == len(rows)
        first = tree_of(groups[0], scores, share_prompt).segments
        assert first == packed.tree.segments[: len(first)]
        sizes = [tokens_of(group, scores, share_prompt) for group in groups]
        total = sum(sizes)
        assert packed.tree.total == packed.tokens.numel() == total + -total % 8
        if share_prompt:
            assert sizes == [distinct_tokens(group, scores) for group in groups]
        trees = [TokenTree(group, scores, share_prompt) for group in groups]
        repeated += sum(tree.repeated for tree in trees)
    assert (repeated > 0) == share_prompt


@pytest.mark.parametrize("common", [LEAST_SHARED - 1, LEAST_SHARED, LEAST_SHARED + 4])
def test_beginnings_are_shared_where_they_are_long_enough(common: int) -> None:
    """Two responses of `common` equal tokens and 3 of their own, behind a prompt of 2; a score has 2 branches more."""
    group = Group([8, 8], [Trajectory([5] * common + [k] * 3, common + 2) for k in (6, 7)], label=1.0)
    scores = ScoreTree([[[1]], [[1, 0]], [[2, 0]]])
    tree = TokenTree(group, scores)
    own = Segment(1, 1), Segment(1, 1), Segment(common + 3, 0), Segment(1, 4), Segment(1, 4)
    if common < LEAST_SHARED:
        assert tree.segments == SegmentTree((Segment(2), Segment(common + 3, 0), *own)) and tree.repeated == 0
    else:
        shared = Segment(3, 1), Segment(1, 2), Segment(1, 2), Segment(3, 1), Segment(1, 5), Segment(1, 5)
        assert tree.segments == SegmentTree((Segment(2), Segment(common, 0), *shared)) and tree.repeated == common


def test_a_sampled_score_is_the_branch_that_it_takes() -> None:
    """Behind 1, 0 the path of the branch (1) is there; those of 2 and 3 are not."""
    scores = ScoreTree([[[1, 0]], [[1, 1]], [[2, 0]], [[2, 1]], [[3, 0]], [[3, 1]]])
    tree = TokenTree(Group([8], [Trajectory([5, 6, 1, 0], 1)], label=1.0), scores)
    assert tree.segments.segments == (Segment(1), Segment(2, 0), Segment(2, 1), Segment(1, 1), Segment(1, 1))
    assert tree.tokens == [8, 5, 6, 1, 0, 2, 3]
    assert tree.token_rows() == [[0, 1, 2, 3]] and tree.answer_rows() == [[2, 3, 5, 6]]
    # From its token 100 on, and as a whole sequence of the response, and of each branch.
    assert tree.answer_rows(100) == [[102, 103, 105, 106]]
    apart = TokenTree(tree.group, scores, share_prompt=False)
    assert apart.tokens == [8, 5, 6, 1, 0, 8, 5, 6, 1, 8, 5, 6, 2, 8, 5, 6, 3]
    assert apart.answer_rows(100) == [[102, 108, 112, 116]]


def test_equal_responses_run_once_however_short_they_are() -> None:
    group = Group([1, 2], [Trajectory([5, 6], 1)] * 3, label=1.0)
    tree = TokenTree(group, TREES["1 to 10"])
    assert tree.total == 2 + 2 + 1 and tree.repeated == 4
    assert tree.answer_rows() == [[3, 4]] * 3 and tree.token_rows() == [[1, 2]] * 3


@pytest.mark.parametrize(("name", "tokens"), [("one digit", 0), ("1 to 10", 1), ("0 to 100 with an end", 10)])
def test_tokens_that_branches_add_to_a_response(name: str, tokens: int) -> None:
    """Of 0 to 100 the branches are 1 to 9, and 10."""
    assert branch_tokens(TREES[name]) == tokens


def test_what_a_response_says_behind_its_anchor() -> None:
    """10, the 1 that ended, the 1 that did not, no score, and no answer; None where nothing was sampled."""
    scores = ScoreTree([[digits(k)] for k in range(1, 11)], ends=[END])
    behind = [[1, 0], [1, END], [1, 5], [END]]
    group = Group([8], [Trajectory([5, *ids], 0) for ids in behind] + [Trajectory([5, 1], None)], label=1.0)
    assert sampled_scores([group], scores).tolist() == [9, 0, -1, -1, -1]
    assert pack([group], scores).sampled.tolist() == [9, 0, -1, -1, -1]
    group.trajectories.append(Trajectory([5], 0))
    assert sampled_scores([group], scores) is None


def test_an_answer_has_a_row_for_each_branch() -> None:
    scores = TREES["1 to 10"]
    packed = pack(random_groups(0), scores)
    answers = packed.answer_trajectory.numel()
    assert packed.row_positions.numel() == packed.token_trajectory.numel() + 2 * answers
    assert packed.ids.numel() == packed.token_trajectory.numel() + scores.width * answers
    answered = [t.answer_index is not None for group in random_groups(0) for t in group.trajectories]
    assert torch.equal(packed.answer_trajectory, torch.tensor(answered).nonzero()[:, 0])
