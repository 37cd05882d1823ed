"""From the configuration to an objective."""

from collections.abc import Sequence

from real_megatron.config import SUPERVISED, ObjectiveConfig, Probabilities
from real_megatron.errors import ConfigError
from real_megatron.objective.advantages import minimum_group_size
from real_megatron.objective.reinforce import ReinforceObjective
from real_megatron.objective.rewards import RewardOptions, find_reward
from real_megatron.objective.sft import SupervisedObjective

WIDTH = 4
"""Of the scores 1 to 5, whose squared errors are as large as log-likelihoods."""
CLOSE = 10
"""Up to so many times larger or smaller squared errors need no other λ."""


def build_objective(
    config: ObjectiveConfig, probabilities: Probabilities = "full"
) -> ReinforceObjective | SupervisedObjective:
    """The objective that `config.name` and its settings describe; `probabilities`: variant of ŷ (scale.probabilities).

    Raises ConfigError for an unknown reward.
    """
    if config.name in SUPERVISED:
        if config.name == "sft":
            return SupervisedObjective(probabilities=probabilities)
        return SupervisedObjective(squared=1.0, lam=config.lam, score_nll=config.score_nll, probabilities=probabilities)
    return ReinforceObjective(
        reward=find_reward(config.reward),
        options=RewardOptions(lam=config.lam, probabilities=probabilities),
        beta=config.beta,
        term1=config.term1,
        baseline=config.baseline,
        std_normalize=config.std_normalize,
        clamp=config.clamp,
        token_mean=config.token_mean,
        kl=config.kl,
        ratio=config.ratio,
        clip=config.clip,
        is_cap=config.is_cap,
        is_level=config.is_level,
        aspect_advantages=config.aspect_advantages,
        floor=config.no_anchor_reward,
    )


def advice_on_lambda(config: ObjectiveConfig, values: Sequence[float]) -> str | None:
    """What to set λ to on a scale with `values` that is much wider or narrower than 1 to 5, for which its default is
    meant; None where it is given, or the loss has no squared error."""
    squared = config.name in ("raft", "tract") or (config.name not in SUPERVISED and config.reward == "real")
    factor = ((max(values) - min(values)) / WIDTH) ** 2
    if not squared or "lam" in config.model_fields_set or 1 / CLOSE < factor < CLOSE:
        return None
    return (
        f"scores from {min(values):g} to {max(values):g}: their squared errors are {factor:.3g} times those of scores "
        f"from 1 to 5, and objective.lam, the weight of the log-likelihood beside them, is {config.lam:g}; the same "
        f"balance as there is objective.lam={factor:.3g} with optimizer.clip_grad multiplied by {factor:.3g}"
    )


def check(config: ObjectiveConfig, *, mini_batches: int, responses: int, aspects: int = 0) -> None:
    """Raise ConfigError when the objective does not fit the batch: `mini_batches`, optimizer updates per rollout batch
    (batch.mini_batches), and `responses` per prompt (rollout.n); or the `aspects` of a response (scale.aspects), 0
    where it has one score; or when its two terms do not fit each other."""
    if config.name in SUPERVISED:
        return
    if aspects and find_reward(config.reward).samples_score:
        raise ConfigError(
            f"objective.reward {config.reward} needs a score that is sampled, and with scale.aspects none is: each is "
            "read behind the critique alone; set objective.reward to binary_expected, which has the sampled score "
            "integrated out"
        )
    if config.std_normalize and config.term1 and config.beta and find_reward(config.reward).has_gradient:
        raise ConfigError(
            "objective.std_normalize divides Term 1 by the standard deviation of each group's rewards, but not Term 2, "
            f"the gradient of the reward {config.reward}: their sum would be the gradient of nothing. Set "
            "objective.std_normalize to false, objective.beta to 0, or objective.reward to one without a Term 2, such "
            "as binary"
        )
    if not config.term1 and not find_reward(config.reward).has_gradient:
        raise ConfigError(
            f"objective.term1 is false and the reward {config.reward} has no gradient: nothing would be learnt; set "
            "objective.term1 to true, or objective.reward to one that has a Term 2, such as binary_expected"
        )
    if mini_batches > 1 and config.ratio == "none":
        raise ConfigError(
            f"batch.mini_batches is {mini_batches}: after the first update the responses are no longer the policy's "
            "own and need an importance ratio; set objective.ratio to ppo or truncated_is, or batch.mini_batches to 1"
        )
    needed = minimum_group_size(config.baseline, config.std_normalize)
    if config.term1 and responses < needed:
        raise ConfigError(
            f"rollout.n is {responses}: the {config.baseline} baseline compares responses to one prompt; set "
            f"rollout.n to {needed} or more, or objective.baseline to none and objective.std_normalize to false"
        )
