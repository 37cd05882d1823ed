"""What a run needs before its policy: settings, output, layout, tokenizer, then data and schedule, read and checked.

Nothing here needs a GPU or the model's weights, and only `prepare_together` a process group, so that a dry run does the
same as a run, and fails with the same messages.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from real_megatron.bridge import ModelDescription
from real_megatron.config import RunConfig
from real_megatron.data import EncodedGroups
from real_megatron.errors import ConfigError, MissingCheckpoint
from real_megatron.hf.directory import check_vocabulary, checkpoint_directory, load_tokenizer
from real_megatron.hf.output import check_output
from real_megatron.hf.side_files import RUN_FILE
from real_megatron.judging.evaluate import EvaluationSet, load_evaluation_sets
from real_megatron.objective.build import advice_on_lambda
from real_megatron.policy.checkpoint import read_state
from real_megatron.policy.model import check_model
from real_megatron.policy.optimizer import check_warmup
from real_megatron.policy.parallel_groups import check_ranks
from real_megatron.rollout.factory import Node, check_servers
from real_megatron.runtime import once_a_host
from real_megatron.scores import ScoreScale
from real_megatron.sections import read_tree
from real_megatron.training.batch_order import BatchOrder
from real_megatron.training.best import check_best
from real_megatron.training.checkpoints import CheckpointStore, reading
from real_megatron.training.lengths import check_lengths
from real_megatron.training.metrics import check_sinks
from real_megatron.training.resume import check_same_run, inputs, saved_inputs

logger = logging.getLogger(__name__)

Load = Callable[[RunConfig, Path, PreTrainedTokenizerBase, ScoreScale], EncodedGroups]
"""From the configuration, the start model's directory, its tokenizer and the score scale."""


@dataclass(frozen=True)
class Settings:
    """What a run starts with, but for its data."""

    model_dir: Path
    """The directory of the Hugging Face checkpoint to start from."""
    description: ModelDescription
    tokenizer: PreTrainedTokenizerBase
    scale: ScoreScale
    store: CheckpointStore


@dataclass(frozen=True)
class Prepared(Settings):
    """What a run starts with."""

    data: EncodedGroups
    """The training groups."""
    evaluation_sets: dict[str, EvaluationSet]
    order: BatchOrder
    steps: int
    updates: int
    """Optimizer updates of all steps."""


def check_settings(config: RunConfig, world: int, planned: Node | None = None) -> Settings:
    """Read and check what needs neither data nor other ranks: what fails fast comes first.

    world, planned: as of `prepare`. Raises ConfigError or CheckpointError when scale, layout and model do not fit
    together, or the output directory holds another run.
    """
    if not config.model.path:
        raise ConfigError("model.path is not set: name the Hugging Face checkpoint to start from")
    check_sinks(config.metrics)
    check_best(config)
    check_ranks(config.parallel, world)
    if config.epochs is None:
        check_warmup(config.optimizer, config.steps * config.batch.mini_batches)
    check_output(config.output, "output")
    store = CheckpointStore(config.output / "checkpoints", config.checkpoint.keep)
    check_same_output(config, store)
    if config.is_rl or config.data.eval:
        check_servers(config.rollout, trainer=True, node=planned)
    with naming_key("model.path"):
        model_dir = checkpoint_directory(config.model.path, config.model.revision, planned is None)
    description = check_model(config, model_dir)
    tokenizer = load_tokenizer(model_dir)
    check_vocabulary(model_dir, tokenizer)
    scale = ScoreScale.of(tokenizer, config.scale)
    widest = max((part.values for part in scale.parts), key=lambda values: max(values) - min(values))
    if advice := advice_on_lambda(config.objective, widest):
        logger.warning("%s", advice)
    return Settings(model_dir, description, tokenizer, scale, store)


def prepare(config: RunConfig, load: Load, world: int, planned: Node | None = None) -> Prepared:
    """Read and check everything that needs neither weights nor GPUs, in one process.

    load: makes the training groups. world: ranks of the run. planned: for a dry run, the node whose GPUs ranks and
    local servers will have; weights of a model on the hub are not downloaded then.

    Raises ConfigError, DataError or CheckpointError when data, scale, layout and model do not fit together, or the
    output directory holds another run.
    """
    return _read(config, check_settings(config, world, planned), load)


def prepare_together(config: RunConfig, settings: Settings, load: Load) -> tuple[Prepared, dict[str, str]]:
    """`settings` with the data, and its `inputs`. The first rank of each host reads, tokenises and stores the data; the
    others map what it has stored. Collective; raises as `once_a_host`, of errors those of `prepare`."""

    def read() -> tuple[EncodedGroups, dict[str, EvaluationSet], dict[str, str]]:
        prepared = _read(config, settings, load)
        found = inputs(config, settings.model_dir, prepared.data.groups)
        return prepared.data, prepared.evaluation_sets, found

    data, evaluation_sets, found = once_a_host(read)
    return _scheduled(config, settings, data, evaluation_sets), found


def _read(config: RunConfig, settings: Settings, load: Load) -> Prepared:
    data = load(config, settings.model_dir, settings.tokenizer, settings.scale)
    evaluation_sets = load_evaluation_sets(config, settings.tokenizer, settings.scale)
    check_lengths(config, settings.model_dir, data.groups, evaluation_sets)
    return _scheduled(config, settings, data, evaluation_sets)


def _scheduled(
    config: RunConfig, settings: Settings, data: EncodedGroups, evaluation_sets: dict[str, EvaluationSet]
) -> Prepared:
    order = BatchOrder(len(data.groups), config.batch.prompts, config.seed)
    steps = order.steps_of(config.epochs) if config.epochs is not None else config.steps
    updates = steps * config.batch.mini_batches
    check_warmup(config.optimizer, updates)
    return Prepared(
        **vars(settings), data=data, evaluation_sets=evaluation_sets, order=order, steps=steps, updates=updates
    )


def export_directory(config: RunConfig) -> Path:
    """Where a run writes its Hugging Face checkpoint."""
    return config.output / "hf"


def check_same_output(config: RunConfig, store: CheckpointStore) -> None:
    """Raise ConfigError when the output directory holds another run's checkpoints or export, or resuming is switched
    off; CheckpointError or OSError for a checkpoint that cannot be read."""
    newest, hf = store.newest(), export_directory(config)
    if newest is not None:
        path = newest[1]
        if not config.checkpoint.resume:
            raise ConfigError(f"{path} exists and checkpoint.resume is false: choose another output, or resume")
        with reading(path):
            state = read_state(path)
        # Its inputs first: an older version had other keys, which nobody could change back.
        saved_inputs(state, str(path))
        check_same_run(state["config"], config, str(path))
    elif config.checkpoint.save_hf and hf.exists():
        if (hf / RUN_FILE).exists():
            saved = read_tree(hf / RUN_FILE)
            if not isinstance(saved.get("data"), dict) or not isinstance(saved["data"].get("train"), list):
                raise ConfigError(f"{hf / RUN_FILE} is not that of a run: choose another output, or remove {hf}")
            check_same_run(saved, config, str(hf))
        elif not hf.is_dir() or any(hf.iterdir()):
            raise ConfigError(f"{hf} exists, and no run has made it: choose another output, or remove it")


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Put the configuration's key in front of the message of a checkpoint that is missing."""
    try:
        yield
    except MissingCheckpoint as error:
        raise MissingCheckpoint(f"{key}: {error}") from error
