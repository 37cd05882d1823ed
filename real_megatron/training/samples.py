"""Some of a step's responses as a person reads them, with what the objective makes of them."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import Probabilities
from real_megatron.objective import ReinforceObjective, ScoredBatch
from real_megatron.objective.rail import expected_score
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreScale, decode

logger = logging.getLogger(__name__)

PROMPTS = 4
RESPONSES = 2


def sample_rows(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    groups: Sequence[Group],
    objective: ReinforceObjective,
) -> list[dict[str, Any]]:
    """The first `RESPONSES` responses of the first `PROMPTS` groups (batches are in random order), as rows of
    samples.jsonl without their step. Collective.

    `id`, `prompt` and `response` as texts (with anchor and special tokens), `ending`: `anchor`, `forced` (the rule
    appended it), `length` or `eos`; `label`; `reward` as the responses of the group are compared by it. `answer`, the
    most probable score, or the one that was sampled where the reward needs one, and `expected_score` are None without
    an anchor; with several aspects these and `label` are mappings. Scores and rewards are those of the policy as
    it is now, before the step's update. No rows, and a warning, where log-probs are not finite.
    """
    chosen = groups[:PROMPTS]
    scored = policy.scored(chosen)
    try:
        rewards = iter(objective.rewards(scored).tolist())
    except FloatingPointError as error:  # the update decides what becomes of such a step
        if policy.runtime.rank == 0:
            logger.warning("no samples are shown of this step: %s", error)
        return []
    answers = iter(_answers(scored, scale, objective.options.probabilities))
    rows, names = [], [aspect.name for aspect in scale.aspects]
    for group in chosen:
        prompt = decode(tokenizer, group.prompt_ids)
        for k, trajectory in enumerate(group.trajectories):
            reward, (score, prediction) = next(rewards), next(answers)
            if k >= RESPONSES:
                continue
            answered = trajectory.answer_index is not None
            if answered and objective.needs_sampled_scores:
                behind = trajectory.score_tokens
                sampled, _ = scale.tree.read(behind)
                score = decode(tokenizer, behind) if sampled is None else scale.texts[sampled]
            rows.append(
                {
                    "id": group.example_id,
                    "prompt": prompt,
                    "response": decode(tokenizer, trajectory.response_ids),
                    "ending": _ending(trajectory),
                    "answer": score if answered else None,
                    "expected_score": prediction if answered else None,
                    "label": dict(zip(names, group.labels, strict=True)) if names else group.label,
                    "reward": reward,
                }
            )
    return rows


def _answers(scored: ScoredBatch, scale: ScoreScale, probabilities: Probabilities) -> list[tuple[Any, Any]]:
    """Of each response the text of the most probable score, and the expected score; of several aspects by name."""
    columns = []
    for aspect, (_, own) in zip(scale.parts, scored.parts(), strict=True):
        best = [aspect.texts[k] for k in own.score_logprobs.argmax(-1).tolist()]
        columns.append((best, expected_score(own.score_logprobs, own.values, probabilities).tolist()))
    if not scale.aspects:
        return list(zip(*columns[0], strict=True))
    names = [aspect.name for aspect in scale.aspects]

    def named(k: int, i: int) -> dict[str, Any]:
        return {name: column[k][i] for name, column in zip(names, columns, strict=True)}

    return [(named(0, i), named(1, i)) for i in range(scored.size)]


def _ending(trajectory: Trajectory) -> str:
    if trajectory.forced_anchor:
        return "forced"
    return "anchor" if trajectory.finish_reason == "stop" else trajectory.finish_reason
