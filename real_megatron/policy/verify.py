"""Does a Megatron model compute what its Hugging Face original computes? Logits of both on random tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from real_megatron import bridge
from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.model import load_model
from real_megatron.hf.side_files import read_config
from real_megatron.policy import cpu, parallel_groups
from real_megatron.policy.attention import PackedParams
from real_megatron.policy.checkpoint import model_state_to_load
from real_megatron.policy.checkpoint_errors import explain_checkpoint_errors
from real_megatron.policy.megatron_versions import load_sharded
from real_megatron.policy.model import build_model
from real_megatron.runtime import default_device


@dataclass(frozen=True)
class Verification:
    """How far the logits of two models are apart."""

    difference: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute logit."""
    tokens: int
    """How many were compared."""

    @property
    def passed(self) -> bool:
        """Equal up to float32 rounding: 1e-5 of the largest logit (at least 1)."""
        return self.difference <= 1e-5 * max(self.scale, 1.0)


def verify(
    hf_path: str | Path,
    megatron_path: str | Path | None = None,
    parallel: ParallelConfig | None = None,
    sequences: int = 2,
    length: int = 32,
    seed: int = 0,
    family: str = "auto",
) -> Verification:
    """Compare float32 logits of a Hugging Face checkpoint and of its Megatron counterpart on random tokens.

    hf_path: a directory, or a name on the hub
    megatron_path: a converted checkpoint; without one the weights come straight from `hf_path`
    parallel: layout of the Megatron model; default: one rank
    sequences, length, seed: of the tokens
    family: as `model.family`

    Collective. Each rank holds the Hugging Face model and then its shard of the Megatron model, one after the other.
    """
    parallel = parallel or ParallelConfig()
    parallel_groups.initialize(parallel, seed)
    hf_path = checkpoint_directory(hf_path)
    description = bridge.describe(read_config(hf_path), family)
    description.rotary.check_length("length", length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(description.vocab_size, (sequences, length), generator=generator)
    expected = hf_logits(hf_path, tokens)
    chunks = build_model(description, parallel, ModelConfig(dtype="float32"))
    if megatron_path is None:
        bridge.load_hf(chunks, description, hf_path)
    else:
        load_weights(chunks, megatron_path)
    logits = model_logits(chunks, tokens)
    result: Verification | None = None
    if logits is not None:
        logits = logits[..., : description.vocab_size].cpu()
        result = Verification((logits - expected).abs().max().item(), expected.abs().max().item(), tokens.numel())
    holder = [result]
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(holder, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    (found,) = holder
    assert found is not None, "the last pipeline stage has the logits"
    return found


def hf_logits(hf_path: str | Path, tokens: Tensor) -> Tensor:
    """transformers' logits for `tokens` `[B, T]`: float32 `[B, T, V]`."""
    model = load_model(hf_path, torch.float32).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def load_weights(chunks: Sequence[MegatronModule], directory: str | Path) -> None:
    """Read the model (nothing else) from a Megatron checkpoint of any layout. Collective.

    Raises OSError for a checkpoint without a weight of the model, or with one of another shape.
    """
    with (
        cpu.device_mode(),
        explain_checkpoint_errors(
            f"{directory}: does not hold this model's weights",
            "compare with the Hugging Face model that it was made from, and with the version that wrote it",
        ),
    ):
        loaded = load_sharded(model_state_to_load(chunks), directory)
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"], strict=True)


def model_logits(chunks: Sequence[nn.Module], tokens: Tensor) -> Tensor | None:
    """The Megatron model's logits for `tokens` `[B, T]`: float32 `[B, T, padded V]` on the last stage, else None.

    Each sequence is one micro-batch of the pipeline schedule. Collective.
    """
    device = default_device()

    def forward_step(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
        tree = SegmentTree((Segment(tokens.size(1)),))
        output = model(
            input_ids=next(batches)[None].to(device),
            position_ids=tree.positions()[None].to(device),
            attention_mask=None,
            packed_seq_params=PackedParams(tree=tree),
        )
        return output, lambda output, non_loss_data: gather_from_tensor_model_parallel_region(output).float()

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), cpu.device_mode():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(tokens) for _ in chunks] if len(chunks) > 1 else iter(tokens),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=tokens.size(0),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return torch.cat(outputs) if outputs else None
