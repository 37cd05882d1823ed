"""What the objective reads, computed the plain way: the reference that the policy is compared with."""

import torch

from real_megatron.batch.types import Trajectory
from real_megatron.objective import ScoredBatch
from tests.support.policy_ranks import SCORE_IDS, SCORE_VALUES


def sampled_only(trajectory: Trajectory, values: list[float]) -> list[float]:
    return [value for value, keep in zip(values, trajectory.loss_mask, strict=True) if keep]


def sampled_score(trajectory: Trajectory) -> int:
    """Index of the response's last token in the scale where it has an answer, -1 where that is no score."""
    last = trajectory.response_ids[-1]
    return SCORE_IDS.index(last) if trajectory.answer_index is not None and last in SCORE_IDS else -1


def hf_scored(model: torch.nn.Module, groups, temperature: float = 1.0) -> ScoredBatch:
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
        scores.append(
            torch.zeros(3, dtype=logp.dtype) if t.answer_index is None else logp[start + t.answer_index, SCORE_IDS]
        )
        index += 1
    return ScoredBatch(
        token_logprobs=torch.stack(tokens),
        token_trajectory=torch.tensor(token_trajectory),
        score_logprobs=torch.stack(scores),
        has_answer=torch.tensor([t.answer_index is not None for _, t in trajectories]),
        labels=torch.tensor([group.label for group, _ in trajectories]),
        group=torch.tensor([g for g, group in enumerate(groups) for _ in group.trajectories]),
        values=torch.tensor(SCORE_VALUES),
        old_logprobs=torch.tensor([x for _, t in trajectories for x in sampled_only(t, t.old_logprobs)]),
        ref_logprobs=torch.tensor([x for _, t in trajectories for x in sampled_only(t, t.ref_logprobs)]),
        sampled=torch.tensor([sampled_score(t) for _, t in trajectories]),
    )
