"""What the ranks do in tests/judging/test_shared_readings.py."""

from pathlib import Path

from real_megatron.evaluation.result import Evaluation
from real_megatron.judging.critiques import _written
from real_megatron.judging.evaluate import EvaluationPrompt, evaluate_set
from real_megatron.judging.kept import KeptReadings
from real_megatron.rollout.engine import RolloutEngine
from real_megatron.runtime import rank
from tests.support.judges import make_judge
from tests.support.rollout_ranks import DRAWN_PARAMS, DRAWN_PROMPTS, SCALE, TOKENIZER, CountedScale, counted, joined

EXAMPLES = [EvaluationPrompt(f"e{i}", 1.0 + i, prompt) for i, prompt in enumerate(DRAWN_PROMPTS)]


def evaluated(engine: RolloutEngine, kept: KeptReadings | None = None) -> tuple[Evaluation, list[int]]:
    """The examples judged two at a time, and the numbers done that were told."""
    told: list[int] = []
    judge = make_judge(engine, TOKENIZER, SCALE, DRAWN_PARAMS, bootstrap=5, batch=2)
    return evaluate_set(judge, EXAMPLES, "set", kept=kept, on_progress=told.append), told


def shared(owned: bool, path: Path):
    """The evaluation on this rank, with what is kept in `path`; what is told; how often the rank has cut a response
    and what it has received."""
    CountedScale.cuts = 0
    with counted() as count:
        result, told = evaluated(joined(owned), KeptReadings(path, {}) if rank() == 0 else None)
        return result, told, CountedScale.cuts, count


def critiques(owned: bool) -> list[list[str]]:
    """The critiques that this rank gets."""
    judge = make_judge(joined(owned), TOKENIZER, SCALE, DRAWN_PARAMS)
    return _written(judge, DRAWN_PROMPTS, DRAWN_PARAMS, [10, 20, 30])
