"""What the engines of the rollout tests are built from."""

from pathlib import Path
from typing import Any

from real_megatron.config import RolloutConfig
from real_megatron.rollout.engine import EngineSpec
from tests.support.rollout_models import word_level


def engine_spec(config: RolloutConfig, model_dir: Path, work_dir: Path, **fields: Any) -> EngineSpec:
    """A specification for prompts of 32 and responses of 16 tokens; `fields` replace its defaults."""
    defaults: dict[str, Any] = {"tokenizer": word_level(), "max_prompt_tokens": 32, "max_response_tokens": 16}
    return EngineSpec(config, model_dir, work_dir=work_dir, **(defaults | fields))
