"""What `benchmarks.step` compares: the model, the groups, and each contender's training step."""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from real_megatron.batch.packing import rows_of
from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import RunConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreTree

LENGTHS = Path(__file__).parent / "lengths" / "vicuna_bench.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOKENS_PER_WORD = 1.35
SCORE_IDS = [16, 17, 18, 19, 20]
SCORES = ScoreTree.of_tokens(SCORE_IDS)
"""1 to 5."""
HUNDRED = ScoreTree([[[15 + int(digit) for digit in str(score)]] for score in range(101)])
"""0 to 100, in a tokenizer that writes digits singly."""
CONTENDERS = ("a", "b", "ours", "binary", "hundred")
"""What `build` knows."""


def scores_of(contender: str) -> ScoreTree:
    """The scores that a contender reads behind each response."""
    return HUNDRED if contender == "hundred" else SCORES


def add_model_sizes(parser: argparse.ArgumentParser, hidden: int) -> None:
    """The arguments that `model_config` reads. hidden: default of --hidden."""
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--ffn", type=int, default=3 * hidden)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=0, help="default: hidden / 64")
    parser.add_argument("--kv-heads", type=int, default=0, help="default: hidden / 256")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tied", action="store_true", help="embedding and output head share their weight")


def model_config(args: argparse.Namespace) -> Qwen3Config:
    """A Qwen3 of the asked size; by default output head and attention take about the share that they have in
    Qwen3-0.6B: a quarter of the weight products each. Qwen3-0.6B itself: --hidden 1024 --ffn 3072 --layers 28
    --vocab 151936 --heads 16 --kv-heads 8 --head-dim 128 --tied."""
    return Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads or args.hidden // 64,
        num_key_value_heads=args.kv_heads or max(args.hidden // 256, 1),
        head_dim=args.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=args.tied,
    )


def make_groups(k: int, prompts: int, vocab: int, seed: int = 0) -> list[Group]:
    """Groups with the benchmark's prompt and critique lengths and random tokens; old log-probs are placeholders."""
    lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    critiques = [words for row in lengths["critique_words"] for words in row]
    groups = []
    for words in rng.sample(lengths["prompt_words"], prompts):
        prompt = [rng.randrange(vocab) for _ in range(round(words * TOKENS_PER_WORD))]
        trajectories = []
        for _ in range(k):
            length = round(rng.choice(critiques) * TOKENS_PER_WORD)
            trajectories.append(Trajectory([rng.randrange(vocab) for _ in range(length)], length - 1))
        groups.append(Group(prompt, trajectories, label=float(rng.randint(1, 5))))
    return groups


class MegatronStep:
    """This package's training step."""

    def __init__(
        self, checkpoint: Path, args: argparse.Namespace, share_prompt: bool, reward: str, scores: ScoreTree
    ) -> None:
        config = RunConfig.model_validate(
            {
                "model": {"path": str(checkpoint)},
                "optimizer": {"lr": 1e-6, "clip_grad": 0.0},
                "batch": {"max_tokens": args.max_tokens, "share_prompt": share_prompt},
                "objective": {"reward": reward},
            }
        )
        first = 0 if scores is HUNDRED else 1
        values = [float(first + k) for k in range(scores.size)]
        self.policy = Policy(config, scores, values, total_updates=10_000)
        self.objective = build_objective(config.objective, config.scale.probabilities)

    def step(self, groups: list[Group]) -> dict[str, float]:
        return self.policy.train_step(groups, self.objective)

    def gradients(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        """Gradients under their Hugging Face names: the weights' own way out, with gradients in their place."""
        self.step(groups)
        parameters = [p for chunk in self.policy.chunks for p in chunk.parameters()]
        weights = [p.data for p in parameters]
        for p in parameters:
            p.data = p.main_grad.to(p.dtype)
        gradients = {name: tensor.clone() for name, tensor in self.policy.export()}
        for p, data in zip(parameters, weights, strict=True):
            p.data = data
        return gradients


class TransformersStep:
    """The step as peers run it, in plain transformers and torch."""

    def __init__(self, checkpoint: Path, args: argparse.Namespace) -> None:
        self.device = torch.device(DEVICE)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPE).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1)
        config = RunConfig()
        self.objective = build_objective(config.objective, config.scale.probabilities)
        self.padded_tokens = args.padded_tokens

    def step(self, groups: list[Group]) -> dict[str, float]:
        loss = self._backward(groups)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss}

    def gradients(self, groups: list[Group]) -> dict[str, torch.Tensor]:
        self._backward(groups)
        return {name: p.grad for name, p in self.model.named_parameters()}

    def _backward(self, groups: list[Group]) -> float:
        totals = Totals(len(groups), sum(len(g.trajectories) for g in groups), sum(rows_of(g, SCORES) for g in groups))
        total = 0.0
        for group in groups:
            with torch.no_grad():
                scored = [self._scored(part) for part in self._microbatches(group)]
                rewards = torch.cat([self.objective.rewards(part) for part in scored])
                index = torch.zeros(len(group.trajectories), dtype=torch.long, device=self.device)
                advantages = self.objective.advantages(rewards, index)
            del scored
            for part in self._microbatches(group):
                scored_part = self._scored(part)
                scored_part.advantages, advantages = advantages.split(
                    [len(part.trajectories), len(advantages) - len(part.trajectories)]
                )
                loss, _ = self.objective(scored_part, totals)
                loss.backward()
                total += float(loss)
        return total

    def _microbatches(self, group: Group) -> list[Group]:
        """The group's responses in as many padded micro-batches as `--padded-tokens` asks for; all at once without."""
        if not self.padded_tokens:
            return [group]
        longest = len(group.prompt_ids) + max(len(t.response_ids) for t in group.trajectories)
        size = max(1, self.padded_tokens // longest)
        starts = range(0, len(group.trajectories), size)
        return [replace(group, trajectories=group.trajectories[i : i + size]) for i in starts]

    def _scored(self, group: Group) -> ScoredBatch:
        """The group's K sequences padded to the longest. Causal attention makes padding at the end harmless."""
        sequences = [torch.tensor(group.prompt_ids + t.response_ids) for t in group.trajectories]
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        logprobs = self.model(tokens, use_cache=False).logits.float().log_softmax(-1)
        chosen = logprobs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        start = len(group.prompt_ids) - 1
        per_response = [chosen[i, start : start + len(t.response_ids)] for i, t in enumerate(group.trajectories)]
        last = torch.tensor([len(s) - 1 for s in sequences], device=self.device)
        count = len(group.trajectories)
        index = torch.repeat_interleave(torch.arange(count), torch.tensor([len(x) for x in per_response]))
        return ScoredBatch(
            token_logprobs=torch.cat(per_response),
            token_trajectory=index.to(self.device),
            score_logprobs=logprobs[torch.arange(count, device=self.device), last][:, SCORE_IDS],
            has_answer=torch.ones(count, dtype=torch.bool, device=self.device),
            labels=torch.full((count,), group.label, device=self.device),
            group=torch.zeros(count, dtype=torch.long, device=self.device),
            values=torch.arange(1.0, 6.0, device=self.device),
        )


def build(contender: str, checkpoint: Path, args: argparse.Namespace) -> MegatronStep | TransformersStep:
    """One of CONTENDERS, with the checkpoint's weights."""
    if contender == "a":
        return TransformersStep(checkpoint, args)
    reward = "binary_expected" if contender == "binary" else "real"
    return MegatronStep(checkpoint, args, contender != "b", reward, scores_of(contender))
