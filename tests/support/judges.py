"""Judges for tests, from an engine and the settings that a test is about."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.judging.judge import Judge
from real_megatron.rollout.engine import RolloutEngine, SamplingParams
from real_megatron.scores import ScoreScale


def make_judge(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    params: SamplingParams,
    *,
    seed: int = 0,
    rule: str = "force",
    probabilities: str = "full",
    bootstrap: int = 1000,
    batch: int = 256,
    name: str = "",
    **data: Any,
) -> Judge:
    """A judge that samples as `params` say; `data`: further keys of that section."""
    tree = {
        "seed": seed,
        "scale": {"probabilities": probabilities},
        "data": {"max_response_tokens": params.max_new_tokens, **data},
        "evaluation": {
            "samples": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "no_anchor": rule,
            "bootstrap": bootstrap,
            "batch_size": batch,
        },
    }
    return Judge(engine, tokenizer, scale, RunConfig.from_tree(tree), name)
