"""What the ranks do in tests/rollout/test_distributed.py."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.factory import build_engine
from tests.support.rollout_fakes import ScriptedEngine
from tests.support.rollout_models import byte_level, tiny_qwen3
from tests.support.rollout_specs import engine_spec

PARAMS = SamplingParams(n=2, max_new_tokens=12, stop=("e",))
PROMPTS = [[5 + i, 6, 7][: 1 + i % 3] * (1 + i % 4) for i in range(7)]
SEEDS = list(range(100, 107))


def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_qwen3(320)).eval()


def collective_export(source, log: list[str]):
    """As a policy's export: every rank must take part in every tensor."""
    for name, tensor in source.named_parameters():
        dist.all_reduce(torch.zeros(1))
        log.append(name)
        yield name, tensor


def embedded():
    """Every rank has an engine: returns what each sees, as plain data."""
    engine = DistributedRollout(TransformersEngine(tiny_qwen3(320), byte_level(), batch_size=4))
    log: list[str] = []
    engine.update_weights(collective_export(model(), log), 5)
    groups = engine.generate(PROMPTS, PARAMS, SEEDS)
    scores = engine.next_token_logprobs(PROMPTS, [5, 9])
    engine.health()
    return [[(r.token_ids, r.logprobs, r.weight_version) for r in g] for g in groups], scores.tolist()


def refused(long: tuple[int, ...], asleep: tuple[int, ...] = ()):
    """Every rank has an engine; the prompts `long` are too long. The ranks `asleep` fail for another reason.

    Returns the error (its kind, text and index, if any) of generating and of scoring, and what is generated without
    those prompts.
    """
    rank = dist.get_rank()
    own = TransformersEngine(tiny_qwen3(320), byte_level(), batch_size=4)
    engine = DistributedRollout(own)
    engine.update_weights(model().named_parameters(), 5)
    prompts = [[5] * 300 if i in long else prompt for i, prompt in enumerate(PROMPTS)]
    if rank in asleep:
        own.sleep()
    errors = []
    for ask in (lambda: engine.generate(prompts, PARAMS, SEEDS), lambda: engine.next_token_logprobs(prompts, [5])):
        try:
            ask()
        except (PromptRefused, EngineError) as error:
            errors.append((type(error).__name__, str(error), getattr(error, "index", None)))
    own.wake()
    kept = [i for i in range(len(prompts)) if i not in long]
    groups = engine.generate([prompts[i] for i in kept], PARAMS, [SEEDS[i] for i in kept])
    return errors, [[r.token_ids for r in group] for group in groups]


class Owner(ScriptedEngine):
    """Stands for servers: echoes the prompts, and may fail."""

    def __init__(self, fail: str = "") -> None:
        super().__init__()
        self.fail = fail

    def generate(self, prompts, params, seeds=None):
        if self.fail == "generate":
            raise EngineError("no server left")
        return [
            [Response([*p, s], [0.0] * (len(p) + 1), "stop", self.version)] for p, s in zip(prompts, seeds, strict=True)
        ]

    def update_weights(self, tensors, version):
        for i, _ in enumerate(tensors):
            if self.fail == "update" and i == 1:
                raise EngineError("server refused")
        self.version = version


def owned(fail: str = ""):
    """Rank 0 owns the servers, the others follow. Returns the results, or the error's text, and the export's log."""
    log: list[str] = []
    engine = DistributedRollout(Owner(fail) if dist.get_rank() == 0 else FollowerEngine())
    try:
        engine.update_weights(collective_export(model(), log), 3)
        groups = engine.generate(PROMPTS, PARAMS, SEEDS)
        scores = engine.next_token_logprobs(PROMPTS, [1, 2]).tolist()
        engine.sleep()
        engine.wake()
        engine.health()
        result = [[(r.token_ids, r.weight_version) for r in g] for g in groups], scores
    except EngineError as error:
        result = str(error)
    # The ranks are still in step.
    total = torch.ones(1)
    dist.all_reduce(total)
    return result, log, total.item()


def misplaced():
    try:
        DistributedRollout(FollowerEngine() if dist.get_rank() == 0 else Owner())
    except ValueError as error:
        return str(error)


def model_of(model_dir: str):
    """The weights that `attached` sends: the checkpoint's, doubled in one norm."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return model


def attached(url: str, key: str, model_dir: str, work_dir: str, prompts: list[list[int]]):
    """Every rank builds the engine that a configuration asks for, syncs from a collective export and generates.

    key: the server's; ranks are kept for several tests, and do not have the environment of the one that runs
    """
    os.environ["KEY_OF_SERVER"] = key
    config = RolloutConfig(engine="sglang", servers=[url], api_key_variable="KEY_OF_SERVER")
    lengths = {"max_prompt_tokens": 64, "max_response_tokens": 64}
    engine = build_engine(engine_spec(config, Path(model_dir), Path(work_dir), tokenizer=byte_level(), **lengths))
    try:
        engine.update_weights(collective_export(model_of(model_dir), []), 1)
        groups = engine.generate(prompts, SamplingParams(n=1, max_new_tokens=12))
        return [(g[0].token_ids, g[0].logprobs) for g in groups]
    finally:
        engine.close()
