"""What is estimated: a layout of the model over GPUs, and the work of one step."""

from dataclasses import dataclass

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class Layout:
    """A model spread over `world` training ranks."""

    description: ModelDescription
    parallel: ParallelConfig
    model: ModelConfig
    """Of it: dtype (`auto` is bfloat16 here), vocab_multiple, recompute, recompute_layers, head_memory_mib,
    fp32_logits."""
    world: int

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return 4 if self.model.dtype == "float32" else 2

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    @property
    def expert_data(self) -> int:
        """Data-parallel size of experts, whose tensor-parallel size is that of the other weights."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline * self.parallel.expert)


@dataclass(frozen=True)
class Workload:
    """The work of one step. Lengths are in tokens."""

    prompts: int
    """`batch.prompts`."""
    responses: int
    """Responses per prompt, `rollout.n`; 1 in supervised training."""
    prompt_tokens: float
    """Mean length of a prompt."""
    response_tokens: float
    """Mean length of a response."""
    max_prompt_tokens: int
    max_response_tokens: int
    max_tokens: int
    """Token budget of a micro-batch, `batch.max_tokens`."""
    mini_batches: int = 1
    """Optimizer updates a step."""
    forward_passes: int = 0
    """Forward passes beside those of the updates: log-probs of the reference policy, or of the sampling policy."""
    share_prompt: bool = True
    generates: bool = True
    """Whether responses are sampled, by rollout servers; False in supervised training."""

    @property
    def updates(self) -> int:
        """Optimizer updates that have a prompt."""
        return max(1, min(self.mini_batches, self.prompts))


def workload_of(config: RunConfig, prompt_tokens: float, response_tokens: float) -> Workload:
    """The work of one step of a run, with the mean lengths of its data."""
    generates = config.is_rl
    passes = int(config.objective.kl > 0) + int(
        config.objective.ratio != "none" and config.batch.old_logprobs == "policy"
    )
    return Workload(
        prompts=config.batch.prompts,
        responses=config.rollout.n if generates else 1,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.data.max_response_tokens,
        max_tokens=config.batch.max_tokens,
        mini_batches=config.batch.mini_batches,
        forward_passes=passes if generates else 0,
        share_prompt=config.batch.share_prompt,
        generates=generates,
    )
