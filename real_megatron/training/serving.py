"""A checkpoint behind a rollout engine: what evaluating, judging and writing CoTs need. No policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.policy.runtime import default_device, default_dtype, host_group
from real_megatron.rollout.engine import RolloutEngine
from real_megatron.rollout.factory import build_engine, check_servers
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError


@dataclass(frozen=True)
class Served:
    """A checkpoint behind an engine."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    scale: ScoreScale


@contextmanager
def served(config: RunConfig, model: Path, work_dir: Path) -> Iterator[Served]:
    """Serve a Hugging Face checkpoint with the configured engine, which is closed at the end. Collective."""
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model}: no config.json there; name the directory of a Hugging Face checkpoint")
    check_servers(config.rollout, trainer=False)
    tokenizer = load_tokenizer(str(model))
    scale = ScoreScale.resolve(tokenizer, config.scale.scores, config.scale.values, config.scale.anchor)
    engine = build_engine(
        config.rollout,
        model,
        tokenizer,
        work_dir,
        device=default_device(),
        dtype=default_dtype(config.model.dtype),
        serve_loaded=True,
        group=host_group(config.parallel),
    )
    try:
        yield Served(engine, tokenizer, scale)
    finally:
        engine.close()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint; remote code is never run."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
