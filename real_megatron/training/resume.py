"""What a checkpoint may be resumed with: the same run, perhaps spread and saved differently."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from real_megatron.config import ParallelConfig, RolloutConfig, RunConfig
from real_megatron.data import load_template
from real_megatron.data.files import source_digest
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import CheckpointError, ConfigError
from real_megatron.hf.identity import model_files
from real_megatron.sections import flatten

# Of the rollouts, what decides which responses are sampled; the rest says where and how fast.
SAMPLING = ("n", "temperature", "top_p", "staleness")

# Decides in which of two forms Megatron keeps the optimizer's state; neither can be read as the other.
FORM = "parallel.distributed_optimizer"

# What may differ: none of it changes the updates that the run makes (but for the order of floating-point sums).
FREE = (
    "output",
    # Where the model and the template are decides nothing: `inputs` says what they are.
    "model.path",
    "data.template",
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
    # What the guard refuses is decided anew by whoever resumes a run that it has ended.
    "optimizer.max_skipped",
    "optimizer.spike_factor",
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
    before, now = flatten(_without_places(saved)), flatten(_without_places(config.model_dump(mode="json")))
    differences = [
        f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if differences:
        longer = {line.split(":")[0].strip() for line in differences} & {"steps", "epochs"}
        raise ConfigError(
            f"{where} belongs to another run:\n"
            + "\n".join(differences)
            + ("\nA run can be given more steps where optimizer.schedule is constant." if longer else "")
            + "\nChange these keys back, or start a new run with another output directory."
        )


def inputs(config: RunConfig, model_dir: Path, groups: StoredGroups) -> dict[str, str]:
    """Digests of what a run reads, by a name for messages: the data sets, the template, the files of the start model
    (which is also the reference of the KL term), and the groups that all of them give (`StoredGroups.digest`).

    The groups stand for what has no file of its own: the code of a format `module:name`, the tokenizer's library. Ids
    are left out, as they may come from a file's name. `model_files` says what is covered of large weights.
    """
    found = {f"data.train.{i}": source_digest(source) for i, source in enumerate(config.data.train)}
    found["data.template"] = _digest(load_template(config.data.template).text)
    found |= {f"model.path: {name}": digest for name, digest in model_files(model_dir).items()}
    found["training examples as tokens"] = groups.digest
    return found


def saved_inputs(state: dict[str, Any], where: str) -> dict[str, str]:
    """The `inputs` of the run that wrote a checkpoint; raises CheckpointError where it does not say them."""
    if "inputs" not in state:
        raise CheckpointError(
            f"{where} does not say which data and model it was trained with: an older version has written it. Start a "
            "new run with another output directory"
        )
    found: dict[str, str] = state["inputs"]
    return found


def check_same_inputs(saved: dict[str, str], now: dict[str, str], config: RunConfig, where: str) -> None:
    """Raise ConfigError, naming each data set and file that is not as it was when the checkpoint was written.

    saved, now: `inputs` of the run that wrote the checkpoint, and of this start.
    """
    what = {f"data.train.{i}": source.path for i, source in enumerate(config.data.train)}
    what["data.template"] = config.data.template
    what |= {name: config.model.path for name in saved.keys() | now.keys() if name.startswith("model.path: ")}
    lines = [
        f"  {name}{f' ({what[name]})' if name in what else ''}: "
        + ("is gone" if name not in now else "was not there" if name not in saved else "its content has changed")
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if lines:
        raise ConfigError(
            f"{where} was trained with other data or another model:\n"
            + "\n".join(lines)
            + "\nPut back what was there, or start a new run with another output directory."
        )


def _without_places(saved: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the paths of training data: `inputs` says what they hold."""
    tree = copy.deepcopy(saved)
    for source in tree["data"]["train"]:
        del source["path"]
    return tree


def _digest(text: str) -> str:
    return hashlib.blake2b(json.dumps(text).encode() + b"\n", digest_size=16).hexdigest()
