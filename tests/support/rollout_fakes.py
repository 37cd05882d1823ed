"""Engines and scales for tests: the smallest things that keep the contract."""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.rollout.engine import Response
from real_megatron.scores import ScoreScale, ScoreTree
from tests.support.rollout_models import tiny_qwen3


class DecodingScale(ScoreScale):
    """A score anchor found by decoding every prefix; no scores."""

    def __init__(self, anchor_text: str, anchor_ids: list[int]) -> None:
        super().__init__([], [], ScoreTree.of_tokens([]), anchor_ids, anchor_text)

    def cut(self, tokenizer, ids):
        for t in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:t])
            if self.anchor_text in text:
                return t if text.endswith(self.anchor_text) else None
        return None


@dataclass
class ScriptedEngine:
    """Returns prepared responses and remembers what it was asked."""

    responses: list[list[Response]] = field(default_factory=list)
    asked: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    version: int = 0

    def generate(self, prompts, params, seeds=None):
        self.asked.append((list(prompts), params, seeds))
        return self.responses

    def branch_logprobs(self, sequences, branches):
        return torch.tensor([[-float(len(s) + len(b.path)) - i for b in branches for i in b.ids] for s in sequences])

    def update_weights(self, tensors, version):
        self.weights = dict(tensors)
        self.version = version

    def sleep(self):
        self.asked.append("sleep")

    def wake(self):
        self.asked.append("wake")

    def health(self):
        self.asked.append("health")

    def close(self):
        self.asked.append("close")


def anchoring_engine(tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> TransformersEngine:
    """A model that likes to say the anchor and then a score: nearly a bigram model, its layers contribute little."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_qwen3(len(tokenizer), tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, 0] = 0.5
        head[scale.anchor_ids[0], 0] += 3.0
        for previous, following in zip(
            scale.anchor_ids, [*scale.anchor_ids[1:], scale.tree.branches[0].ids[0]], strict=True
        ):
            direction = embeddings[previous].clone()
            direction[0] = 0
            head[following] += 4.0 * direction
    engine = TransformersEngine(model.config, tokenizer)
    engine.update_weights(model.named_parameters(), 0)
    return engine
