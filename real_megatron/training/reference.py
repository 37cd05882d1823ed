"""The reference policy of the KL term: the weights a run started from."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from real_megatron.batch.types import Group, Trajectory
from real_megatron.policy.policy import Policy


class ReferenceWeights:
    """A frozen copy, on the host, of this rank's shard of the policy's weights.

    Log-probs under the reference come from the policy's own model with these weights swapped in, so the reference
    needs no device memory beyond one parameter at a time, and both see the same kernels and layout. Take the copy
    before a checkpoint is loaded: the reference is what the run started from, not where it was resumed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    def annotate(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `ref_logprobs` on every trajectory. Collective; leaves the policy's weights as they were."""
        with torch.no_grad():
            current = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]
            self._set(self._weights)
            try:
                scored = self._policy.logprobs(groups)
            finally:
                self._set(current)
        return [
            replace(group, trajectories=[replace(t, ref_logprobs=spread(t, s.tokens)) for t, s in pairs])
            for group, pairs in (
                (group, list(zip(group.trajectories, row, strict=True)))
                for group, row in zip(groups, scored, strict=True)
            )
        ]

    def _set(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self._parameters(), weights, strict=True):
            parameter.data.copy_(weight)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self._policy.chunks for parameter in chunk.parameters()]


def spread(trajectory: Trajectory, of_loss_tokens: Sequence[float]) -> list[float]:
    """Log-probs of the loss-carrying tokens, laid out over all response tokens (0 where no loss is carried)."""
    values = iter(of_loss_tokens)
    return [next(values) if carries_loss else 0.0 for carries_loss in trajectory.loss_mask]
