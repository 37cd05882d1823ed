"""Published times of reinforcement-learning steps and weight syncs on H100s, their set-ups in this package's terms.

What a set-up does not say is an assumption here, and stated. All are of others' frameworks: `tools/scaling_study.py`
compares projections with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import AutoConfig

from real_megatron.bridge import ModelDescription, describe
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.hardware import GPUS
from real_megatron.planning.servers import Servers
from real_megatron.planning.step_time import StepTime, step_time
from real_megatron.planning.sync_time import sync_time
from real_megatron.planning.workload import Layout, Workload

CONFIGS = Path(__file__).parents[1] / "tests" / "fixtures" / "configs"
H100 = GPUS["H100"]
PHASES = ("update", "log-probs", "rollout", "sync")
BLOG = (
    "NVIDIA developer blog, “Reinforcement Learning with NVIDIA NeMo-RL: Megatron-Core Support for Optimized Training "
    "Throughput” (NeMo-RL 0.3), table 1"
)
SUMMARY = "NeMo-RL documentation, “Performance summary”, H100 BF16: the rows of 0.6, of 0.5 for models that 0.6 lacks"
VERL = "verl-project/verl issue 7060 and pull request 7085: `timing_s/update_weights` of the engine `nccl`, H100"
SLIME = "Biao He and others, “Efficient RL Training: Optimizing Weight Sync in slime” (hebiao064.github.io), 8 H100s"


@cache
def description_of(model: str) -> ModelDescription:
    """A model of tests/fixtures/configs."""
    return describe(AutoConfig.from_pretrained(CONFIGS / f"{model}.json"))


@dataclass(frozen=True)
class PublishedStep:
    """A GRPO step of NeMo-RL on OpenMathInstruct-2: sequences packed to the longest, prompts not shared."""

    model: str
    source: str
    world: int
    """Training GPUs."""
    tensor: int
    pipeline: int
    context: int
    expert: int
    server_gpus: int
    server_tensor: int
    colocated: bool
    sequences: int
    """Responses a step."""
    response_tokens: int
    """Mean length of a response."""
    max_sequence: int
    recompute: str
    seconds: float
    phases: Mapping[str, float]
    """Seconds of phases, named as in StepTime; empty where the source has the total only."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.world + (0 if self.colocated else self.server_gpus)

    @property
    def layout(self) -> Layout:
        """In this package's terms."""
        description = description_of(self.model)
        uneven = description.num_layers % self.pipeline > 0
        parallel = ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            account_for_embedding=uneven,
            account_for_loss=uneven,
            context=self.context,
            expert=self.expert,
            sequence_parallel=self.tensor > 1,
        )
        model = ModelConfig.model_validate({"recompute": self.recompute, "head": "logits"})
        return Layout(description, parallel, model, self.world)

    @property
    def workload(self) -> Workload:
        """In this package's terms: a prompt per response, since prompts are not shared."""
        prompt = 110  # tokens in training over sequences, less the mean response, in the rows of 0.4
        return Workload(
            prompts=self.sequences,
            responses=1,
            prompt_tokens=prompt,
            response_tokens=self.response_tokens,
            max_prompt_tokens=prompt,
            max_response_tokens=self.max_sequence - prompt,
            max_tokens=self.max_sequence,
            mini_batches=self.sequences // 512,
            forward_passes=2,  # log-probs of the policy before the step, and of the reference
            share_prompt=False,
        )

    @property
    def servers(self) -> Servers:
        """vLLM takes 1,024 sequences at a time."""
        return Servers(
            gpus=self.server_gpus,
            tensor=self.server_tensor,
            colocated=self.colocated,
            staleness=0 if self.colocated else 1,
            concurrency=1024,
            keep_weights=False,
        )

    def projected(self) -> StepTime:
        """With the default efficiencies."""
        return step_time(self.layout, self.workload, H100, self.servers)


def _step(
    model: str,
    source: str,
    gpus: tuple[int, int],
    layout: tuple[int, int, int, int],
    server_tensor: int,
    lengths: tuple[int, int, int],
    recompute: str,
    *seconds: float,
) -> PublishedStep:
    """gpus: training, serving (0: the same). layout: tensor, context, expert, pipeline, as the tables have it, but for
    experts: these are whole on a rank there and have the layout's tensor-parallel size here, so that as many ranks
    share them where expert is smaller by that. lengths: responses a step, their mean length, the longest sequence.
    seconds: the total, and those of PHASES."""
    world, serving = gpus
    tensor, context, expert, pipeline = layout
    return PublishedStep(
        model, source, world, tensor, pipeline, context, expert,
        serving or world, server_tensor, not serving, *lengths, recompute, seconds[0],
        dict(zip(PHASES, seconds[1:], strict=len(seconds) > 1)),
    )  # fmt: skip


STEPS = (
    # The blog does not say the servers' sizes, taken as in 0.4's table, nor recomputation: the ratio of training to
    # log-probs is that of three forward passes to two, or for the mixture of experts four.
    _step("Llama-3.1-8B", BLOG, (8, 0), (1, 1, 1, 1), 1, (2048, 795, 4096), "none", 112, 28, 18, 58, 5),
    _step("Llama-3.1-70B", BLOG, (64, 0), (4, 1, 1, 4), 4, (2048, 398, 4096), "none", 147, 28, 18, 84, 14),
    _step("Qwen3-32B", BLOG, (64, 0), (4, 1, 1, 2), 4, (2048, 3283, 4096), "none", 213, 68, 40, 96, 7),
    _step("Qwen3-30B-A3B", BLOG, (64, 0), (2, 1, 4, 1), 4, (2048, 3251, 4096), "full", 167, 50, 23, 78, 12),
    # Recipes of the same release say whether activations are recomputed.
    _step("Llama-3.1-8B", SUMMARY, (16, 0), (1, 1, 1, 2), 1, (2048, 1019, 4096), "full", 92.8),
    _step("Llama-3.1-8B", SUMMARY, (8, 8), (1, 1, 1, 1), 1, (2048, 1123, 4096), "full", 64.8),
    _step("Qwen3-32B", SUMMARY, (32, 0), (4, 1, 1, 4), 4, (2048, 3251, 4096), "full", 376),
    _step("Qwen3-32B", SUMMARY, (32, 32), (4, 1, 1, 4), 4, (2048, 3252, 4096), "full", 200),
    _step("Qwen3-30B-A3B", SUMMARY, (32, 0), (1, 1, 8, 1), 2, (2048, 3203, 4096), "full", 192),
    _step("Qwen3-30B-A3B", SUMMARY, (16, 16), (1, 1, 8, 2), 2, (2048, 3201, 4096), "full", 152),
    _step("Qwen3-235B-A22B", SUMMARY, (128, 0), (2, 2, 8, 8), 16, (512, 5698, 8192), "full", 395),
    _step("Qwen3-235B-A22B", SUMMARY, (256, 0), (2, 2, 8, 8), 16, (512, 5713, 8192), "full", 312),
    _step("Qwen3-235B-A22B", SUMMARY, (128, 128), (4, 1, 4, 8), 8, (512, 5721, 8192), "full", 231),
)


@dataclass(frozen=True)
class PublishedSync:
    """A weight sync. Sizes that are not given for a model of tests/fixtures/configs stand for one of the same size."""

    model: str
    source: str
    set_up: str
    world: int
    tensor: int
    expert: int
    servers: Servers
    seconds: float

    def projected(self) -> float:
        """Seconds, with the default efficiencies."""
        parallel = ParallelConfig(tensor=self.tensor, expert=self.expert)
        layout = Layout(description_of(self.model), parallel, ModelConfig(), self.world)
        return sum(sync_time(layout, H100, self.servers).values())


def _apart(gpus: int, tensor: int) -> Servers:
    return Servers(gpus, tensor, keep_weights=False)


SYNCS = (
    PublishedSync("Qwen2.5-72B", VERL, "FSDP 32, servers 4 × TP 8", 32, 1, 1, _apart(32, 8), 28.8),
    PublishedSync("Qwen3-30B-A3B", VERL, "Megatron TP 4 × EP 2, servers TP 4", 8, 4, 2, _apart(8, 4), 24.9),
    PublishedSync("Qwen3-235B-A22B", VERL, "EP 8 × FSDP 8, server TP 16", 64, 1, 8, _apart(16, 16), 256),
    PublishedSync(
        "Qwen3-30B-A3B", SLIME, "colocated, TP 4, EP 8", 8, 1, 8, Servers(8, 8, colocated=True, keep_weights=False), 7
    ),
)
