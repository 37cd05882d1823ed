"""What the ranks do in tests/rollout/test_distributed.py and tests/rollout/test_shared_responses.py."""

import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.rollout.factory import build_engine
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.scores import Branch, ScoreScale
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


BRANCHES = [Branch((), (5, 9)), Branch((7,), (3,)), Branch((7, 3), (9, 8))]


def embedded():
    """Every rank has an engine: returns what each sees, as plain data."""
    engine = DistributedRollout(TransformersEngine(tiny_qwen3(320), byte_level(), batch_size=4))
    log: list[str] = []
    engine.update_weights(collective_export(model(), log), 5)
    groups = engine.generate(PROMPTS, PARAMS, SEEDS)
    scores = engine.branch_logprobs(PROMPTS, BRANCHES)
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
    for ask in (
        lambda: engine.generate(prompts, PARAMS, SEEDS),
        lambda: engine.branch_logprobs(prompts, [Branch((), (5,))]),
    ):
        try:
            ask()
        except (PromptRefused, EngineError) as error:
            errors.append((type(error).__name__, str(error), getattr(error, "index", None)))
    own.wake()
    kept = [i for i in range(len(prompts)) if i not in long]
    groups = engine.generate([prompts[i] for i in kept], PARAMS, [SEEDS[i] for i in kept])
    return errors, [[r.token_ids for r in group] for group in groups]


class Drawn(ScriptedEngine):
    """Responses that follow from prompt, seed and sample alone, of every kind: with a score, with another token or
    nothing behind the anchor, without an anchor; their log-probs are no float32 numbers. Some prompts are refused,
    alone or with a forced anchor behind them, or have log-probs that are not finite."""

    def __init__(self, refused: tuple[int, ...] = (), refused_behind: tuple[int, ...] = (), nan: tuple[int, ...] = ()):
        super().__init__()
        self.refused, self.refused_behind, self.nan = refused, refused_behind, nan

    def generate(self, prompts, params, seeds=None):
        behind = params.max_new_tokens == 1
        for i, prompt in enumerate(prompts):
            if prompt[0] in (self.refused_behind if behind else self.refused):
                raise PromptRefused(i, "too long")
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            row = []
            for k in range(params.n):
                draw = seed + k
                texts = ("good [RESULT] 4", "so [RESULT] the end", "none at all", "cut [RESULT] 5 off" * 3)
                ids = [SCALE.score_ids[draw % 3]] if behind else TOKENIZER.encode("x" * (draw % 5) + texts[draw % 4])
                logprobs = [-0.1 * (1 + i + draw % 7) for i in range(len(ids))]
                if prompt[0] in self.nan:
                    logprobs[-1] = float("nan")
                watched = [[logprob - i for i in range(3)] for logprob in logprobs]
                reason = ("stop", "stop", "length" if draw % 8 > 3 else "eos", "length")[draw % 4]
                row.append(Response(ids, logprobs, reason, 5 + draw % 2, watched if params.watch_ids else None))
            groups.append(row)
        return groups


class CountedScale(ScoreScale):
    """Counts the responses that are cut."""

    cuts = 0

    def cut(self, tokenizer, ids):
        CountedScale.cuts += 1
        return super().cut(tokenizer, ids)


TOKENIZER = byte_level()
SCALE = CountedScale.resolve(TOKENIZER, ["1", "4", "5"], None, "[RESULT] ")
DRAWN_PARAMS = SamplingParams(n=8, max_new_tokens=64)
DRAWN_PROMPTS = [[9], [5, 6, 7], [3, 4]]


def joined(owned: bool, **faults) -> DistributedRollout:
    """The ranks' engine: Drawn on every rank, or on the first with followers."""
    return DistributedRollout(FollowerEngine() if owned and dist.get_rank() else Drawn(**faults))


@contextmanager
def counted():
    """Counts what collectives give this rank: `received` bytes of others, and the bytes of its largest own `header`."""
    count = {"received": 0, "header": 0}
    broadcast, receive, gather = dist.broadcast, dist.recv, dist.all_gather_object

    def counting_broadcast(tensor, *, group_src, group):
        count["received"] += tensor.numel() * (group_src != dist.get_rank(group))
        broadcast(tensor, group_src=group_src, group=group)

    def counting_receive(tensor, *, group_src, group):
        count["received"] += tensor.numel()
        receive(tensor, group_src=group_src, group=group)

    def counting_gather(values, value, group):
        count["header"] = max(count["header"], len(pickle.dumps(value)))
        gather(values, value, group=group)

    with (
        mock.patch.object(dist, "broadcast", counting_broadcast),
        mock.patch.object(dist, "recv", counting_receive),
        mock.patch.object(dist, "all_gather_object", counting_gather),
    ):
        yield count


def sample(engine, rule: str, score: bool):
    return sample_trajectories(engine, TOKENIZER, SCALE, DRAWN_PROMPTS, DRAWN_PARAMS, rule, [10, 20, 30], score=score)


def sampled(owned: bool, rule: str, score: bool):
    """What this rank has sampled, how often it has cut, and what it has received."""
    engine, CountedScale.cuts = joined(owned), 0
    with counted() as count:
        return sample(engine, rule, score), CountedScale.cuts, count


def sampling_errors(owned: bool, faults: dict[str, tuple[int, ...]]):
    """The error of sampling: its kind, index and text."""
    try:
        sample(joined(owned, **faults), "force", True)
    except (PromptRefused, EngineError) as error:
        return type(error).__name__, error.index, str(error)


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
        scores = engine.branch_logprobs(PROMPTS, [Branch((), (1, 2))]).tolist()
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
