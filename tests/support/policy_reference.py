"""What the objective reads, computed the plain way: the reference that the policy is compared with."""

import torch

from real_megatron.batch.types import Trajectory
from real_megatron.objective import ScoredBatch
from real_megatron.scores import ScoreTree
from tests.support.policy_ranks import SCORE_IDS, SCORE_VALUES

FLAT = ScoreTree.of_tokens(SCORE_IDS)


def sampled_only(trajectory: Trajectory, values: list[float]) -> list[float]:
    return [value for value, keep in zip(values, trajectory.loss_mask, strict=True) if keep]


def sampled_score(trajectory: Trajectory, tree: ScoreTree) -> int:
    """Index of the score that the tokens behind the answer position are, -1 where they are none, or not all of one."""
    if trajectory.answer_index is None:
        return -1
    behind = tuple(trajectory.response_ids[trajectory.answer_index + 1 :])
    # The last token may be the one that ends a score.
    said = [behind, behind[:-1]]
    found = [k for k, path in enumerate(tree.paths) if path in said]
    longest = max(found, key=lambda k: len(tree.paths[k]), default=-1)
    if longest < 0:
        return -1
    path = tree.paths[longest]
    inner = any(other[: len(path)] == path != other for other in tree.paths)
    ended = not inner or (len(behind) > len(path) and (not tree.ends or behind[-1] in tree.ends))
    return longest if ended else -1


def scores_of_texts(model: torch.nn.Module, before: list[int], tree: ScoreTree) -> torch.Tensor:
    """log π of each score behind these tokens: its whole text through the model, those of equal length together.

    A score that another begins with also needs what follows: an end of the scale, or no token of the others.
    """
    found = {}
    for length in {len(path) for path in tree.paths}:
        paths = [path for path in tree.paths if len(path) == length]
        texts = torch.tensor([[*before, *path] for path in paths])
        for path, logp in zip(paths, model(texts).logits.log_softmax(-1)[:, len(before) - 1 :], strict=True):
            following = torch.ones(logp.size(-1), dtype=torch.bool)
            further = {other[length] for other in tree.paths if other[:length] == path != other}
            if further and tree.ends:
                following = ~following.index_fill(0, torch.tensor(tree.ends), False)
            elif further:
                following[list(further)] = False
            found[path] = sum(logp[t, token] for t, token in enumerate(path)) + logp[-1, following].logsumexp(0)
    return torch.stack([found[path] for path in tree.paths])


def hf_scored(
    model: torch.nn.Module, groups, temperature: float = 1.0, tree: ScoreTree = FLAT, values: list[float] = SCORE_VALUES
) -> ScoredBatch:
    """What the objective reads, from whole sequences through transformers and a full log_softmax: sampled tokens at
    `temperature`, scores at 1."""
    tokens, token_trajectory, scores, index = [], [], [], 0
    trajectories = [(group, t) for group in groups for t in group.trajectories]
    for group, t in trajectories:
        sequence = torch.tensor([group.prompt_ids + t.response_ids])
        logits = model(sequence).logits[0]
        logp, sampled = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
        start = len(group.prompt_ids)
        for i, keep in enumerate(t.loss_mask):
            if keep:
                tokens.append(sampled[start + i - 1, t.response_ids[i]])
                token_trajectory.append(index)
        if t.answer_index is None:
            scores.append(torch.zeros(tree.size, dtype=logp.dtype))
        elif tree.flat:
            scores.append(logp[start + t.answer_index, list(tree.branches[0].ids)])
        else:
            before = group.prompt_ids + t.response_ids[: t.answer_index + 1]
            scores.append(scores_of_texts(model, before, tree))
        index += 1
    return ScoredBatch(
        token_logprobs=torch.stack(tokens),
        token_trajectory=torch.tensor(token_trajectory),
        score_logprobs=torch.stack(scores),
        has_answer=torch.tensor([t.answer_index is not None for _, t in trajectories]),
        labels=torch.tensor([group.label for group, _ in trajectories]),
        group=torch.tensor([g for g, group in enumerate(groups) for _ in group.trajectories]),
        values=torch.tensor(values),
        old_logprobs=torch.tensor([x for _, t in trajectories for x in sampled_only(t, t.old_logprobs)]),
        ref_logprobs=torch.tensor([x for _, t in trajectories for x in sampled_only(t, t.ref_logprobs)]),
        sampled=torch.tensor([sampled_score(t, tree) for _, t in trajectories]),
    )
