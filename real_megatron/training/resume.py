"""Which configuration a checkpoint may be resumed with: the same run, perhaps spread and saved differently."""

from typing import Any

from real_megatron.config import ParallelConfig, RolloutConfig, RunConfig
from real_megatron.errors import ConfigError

# Of the rollouts, what decides which responses are sampled; the rest says where and how fast.
SAMPLING = ("n", "temperature", "top_p", "staleness")

# Decides in which of two forms Megatron keeps the optimizer's state; neither can be read as the other.
FORM = "parallel.distributed_optimizer"

# What may differ: none of it changes which updates the run makes (but for the order of floating-point sums).
FREE = (
    "output",
    *(name for name in (f"parallel.{key}" for key in ParallelConfig.model_fields) if name != FORM),
    "model.dtype",
    "model.spec",
    "model.megatron_class",
    "model.vocab_multiple",
    "model.recompute",
    "model.recompute_layers",
    "model.head",
    "model.head_memory_mib",
    "model.fp32_logits",
    "batch.max_tokens",
    "batch.share_prompt",
    *(f"rollout.{name}" for name in RolloutConfig.model_fields if name not in SAMPLING),
    "data.eval",
    "evaluation",
    "checkpoint",
    "metrics",
)


def check_same_run(saved: dict[str, Any], config: RunConfig, where: str) -> None:
    """Raise ConfigError, listing each difference, unless `config` continues the run whose configuration was saved.

    saved: `config.model_dump(mode="json")` of the run that wrote the checkpoint. The number of steps may change where
    the learning rate does not decay towards it, the model's dtype where the optimizer's state is distributed: else its
    form depends on the dtype.
    """
    free = FREE + (("steps", "epochs") if config.optimizer.schedule == "constant" else ())
    if not config.parallel.distributed_optimizer:
        free = tuple(name for name in free if name != "model.dtype")
    before, now = _flatten(saved), _flatten(config.model_dump(mode="json"))
    differences = [
        f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if differences:
        raise ConfigError(
            f"{where} belongs to another run:\n"
            + "\n".join(differences)
            + "\nChange these keys back, or start a new run with another output directory."
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
