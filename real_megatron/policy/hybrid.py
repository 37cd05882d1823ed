"""The judge on Megatron-Core's HybridModel (from 0.19) instead of GPTModel: `model.megatron_class`.

Same parameter names, same checkpoint keys, same calls. docs/hybrid_model.md says what HybridModel lacks, and why a
symbol of its pattern stands for a whole layer here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig
from real_megatron.policy.attention import PackedParams
from real_megatron.policy.judge_head import JudgeHead
from real_megatron.policy.layers import layer_spec, norm_class


class JudgeStack(HybridStack):
    """HybridStack with a final norm of ours, and with the names and checkpoint keys of GPTModel's TransformerBlock.

    HybridStack itself always builds Transformer Engine's norm, and calls it `final_norm`.
    """

    def __init__(self, config: TransformerConfig, *args: Any, norm: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(*args, **kwargs)
        return self.final_layernorm(hidden) if self.post_process else hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layers of dense models are stacked, with the layer as the first axis (bridge/placement.py)."""
        stacked = not self.config.num_moe_experts
        state: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            here, number = f"{prefix}layers.{index}.", layer.layer_number - 1
            offsets = [(0, number, self.config.num_layers)] if stacked else []
            part = layer.sharded_state_dict(here, offsets, metadata)
            replace_prefix_for_sharding(part, here, f"{prefix}layers." if stacked else f"{prefix}layers.{number}.")
            state.update(part)
        if self.post_process:
            state.update(
                sharded_state_dict_default(
                    self.final_layernorm, f"{prefix}final_layernorm.", (), metadata, tp_group=self.tp_group
                )
            )
        return state


class HybridJudgeModel(JudgeHead, HybridModel):
    """HybridModel with a judge's head and positions.

    HybridModel has neither `output_processor` nor methods for what comes before and after its decoder: `forward` is
    replaced. What is left out: inference, multi-token prediction, activation offloading, Megatron's own loss.
    """

    @staticmethod
    def layer_arguments(
        config: TransformerConfig, description: ModelDescription, model: ModelConfig, vp_stage: int | None
    ) -> dict[str, Any]:
        """The arguments that say which layers there are: the same pattern for every chunk, which takes its part."""
        layer = partial(layer_spec, config, description, model)
        submodules = HybridStackSubmodules(attention_layer=layer(moe=False))
        if description.num_experts:
            submodules.moe_layer = layer(moe=True)
        stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        return {
            "hybrid_stack_spec": ModuleSpec(
                module=JudgeStack, params={"norm": norm_class(model)}, submodules=submodules
            ),
            "hybrid_layer_pattern": layer_pattern(description, stages),
        }

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: None, *, packed_seq_params: PackedParams
    ) -> Tensor:
        hidden: Tensor = self.decoder(
            # Later stages of the pipeline have their input already.
            hidden_states=self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self.rotary(position_ids),
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process:
            return hidden
        if packed_seq_params.head_rows is not None:
            return self.head(hidden, packed_seq_params.head_rows)
        tied = self.share_embeddings_and_output_weights
        logits, _ = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight() if tied else None)
        return logits.transpose(0, 1).contiguous()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the empty object that GPTModel leaves out as well."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.endswith("output_layer._extra_state")}


def layer_pattern(description: ModelDescription, stages: int) -> str:
    """One symbol a layer of the Hugging Face model, equally many for each stage of the pipeline."""
    symbols = [
        Symbols.MOE if description.is_moe_layer(layer) else Symbols.ATTENTION for layer in range(description.num_layers)
    ]
    count = len(symbols) // stages
    return Symbols.PIPE.join("".join(symbols[i : i + count]) for i in range(0, len(symbols), count))
