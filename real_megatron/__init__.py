"""REAL: regression-aware reinforcement learning for LLM judges on Megatron-Core (arXiv 2603.17145).

The library: what `__all__` lists, imported on first use, so that judging needs no Megatron-Core and `import
real_megatron` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from real_megatron.version import VERSION as __version__

if TYPE_CHECKING:
    from real_megatron.bridge.convert import Conversion as Conversion
    from real_megatron.bridge.convert import convert_hf_to_megatron as convert_hf_to_megatron
    from real_megatron.bridge.convert import convert_megatron_to_hf as convert_megatron_to_hf
    from real_megatron.bridge.families import register_family as register_family
    from real_megatron.config import RunConfig as RunConfig
    from real_megatron.data.formats import register_format as register_format
    from real_megatron.errors import CheckpointError as CheckpointError
    from real_megatron.errors import ConfigError as ConfigError
    from real_megatron.errors import DataError as DataError
    from real_megatron.errors import EngineError as EngineError
    from real_megatron.errors import PromptRefused as PromptRefused
    from real_megatron.errors import UnsupportedModel as UnsupportedModel
    from real_megatron.errors import UserError as UserError
    from real_megatron.evaluation.result import Evaluation as Evaluation
    from real_megatron.judging.critiques import write_critiques as write_critiques
    from real_megatron.judging.evaluate import evaluate as evaluate
    from real_megatron.judging.file import JudgeSummary as JudgeSummary
    from real_megatron.judging.file import judge_file as judge_file
    from real_megatron.judging.judge import Judge as Judge
    from real_megatron.judging.judge import Score as Score
    from real_megatron.judging.reading import Reading as Reading
    from real_megatron.objective.rewards import RewardOptions as RewardOptions
    from real_megatron.objective.rewards import register_reward as register_reward
    from real_megatron.objective.types import ResponseView as ResponseView
    from real_megatron.policy.verify import Verification as Verification
    from real_megatron.policy.verify import verify as verify
    from real_megatron.rollout.engine import register_engine as register_engine
    from real_megatron.training.rl import train as train
    from real_megatron.training.sft import train as sft  # noqa: F401  # a name of this package, not of the module

# name → module, and the name there where it is another one
_PLACES = {
    "Judge": "judging.judge",
    "Score": "judging.judge",
    "RunConfig": "config",
    "JudgeSummary": "judging.file",
    "Reading": "judging.reading",
    "Evaluation": "evaluation.result",
    "Conversion": "bridge.convert",
    "Verification": "policy.verify",
    "RewardOptions": "objective.rewards",
    "ResponseView": "objective.types",
    "train": "training.rl",
    "sft": "training.sft:train",
    "evaluate": "judging.evaluate",
    "judge_file": "judging.file",
    "write_critiques": "judging.critiques",
    "convert_hf_to_megatron": "bridge.convert",
    "convert_megatron_to_hf": "bridge.convert",
    "verify": "policy.verify",
    "register_reward": "objective.rewards",
    "register_format": "data.formats",
    "register_engine": "rollout.engine",
    "register_family": "bridge.families",
    "UserError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "UnsupportedModel": "errors",
    "EngineError": "errors",
    "PromptRefused": "errors",
}

__all__ = ["__version__", *_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other = _PLACES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), other or name)


def __dir__() -> list[str]:
    return sorted(__all__)
