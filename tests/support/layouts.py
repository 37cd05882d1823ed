"""Real models by their configuration alone."""

from functools import cache
from pathlib import Path

from transformers import AutoConfig

from real_megatron.bridge import ModelDescription, describe

CONFIGS = Path(__file__).parents[1] / "fixtures/configs"


@cache
def described(name: str) -> ModelDescription:
    """The description of tests/fixtures/configs/NAME.json."""
    return describe(AutoConfig.from_pretrained(CONFIGS / f"{name}.json"))
