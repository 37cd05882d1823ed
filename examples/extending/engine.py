"""A rollout engine of your own. In the configuration: `rollout.engine: engine:plain`."""

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.embedded.head import use_float32_logits
from real_megatron.rollout.engine import EngineSpec, Response, SamplingParams, register_engine
from real_megatron.scores import Branch


class PlainEngine:
    """Samples token by token from a Hugging Face model, without a cache: slow, but all that the protocol asks for."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.serve_loaded:
            model = AutoModelForCausalLM.from_pretrained(spec.model_dir, dtype=spec.dtype)
        else:
            model = AutoModelForCausalLM.from_config(spec.hf_config(), dtype=spec.dtype)
        self.model = model.to(spec.device).eval().requires_grad_(False)
        if spec.fp32_logits:
            use_float32_logits(self.model)
        self.tokenizer, self.stop_ids, self.max_tokens = spec.tokenizer, spec.stop_ids(), spec.max_tokens
        self.version = 0 if spec.serve_loaded else None

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        self.health()
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + params.max_new_tokens > self.max_tokens:
                raise PromptRefused(i, f"the prompt has {len(prompt)} tokens, too few or too many")
        seeds = [random.getrandbits(63) for _ in prompts] if seeds is None else seeds
        return [
            [self._sample(prompt, params, torch.Generator().manual_seed(seed + k)) for k in range(params.n)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def _sample(self, prompt: list[int], params: SamplingParams, generator: torch.Generator) -> Response:
        response = Response([], [], "length", self.version, [] if params.watch_ids else None)
        for _ in range(params.max_new_tokens):
            logits = self._logits([*prompt, *response.token_ids]) / (params.temperature or 1.0)
            logprobs = logits.log_softmax(-1)  # what is reported: before top-p
            if params.temperature == 0:
                token = int(logprobs.argmax())
            else:
                p, order = logprobs.exp().sort(descending=True)
                p[p.cumsum(0) - p >= params.top_p] = 0  # what is drawn from: the nucleus
                token = int(order[p.multinomial(1, generator=generator)])
            response.token_ids.append(token)
            response.logprobs.append(float(logprobs[token]))
            if response.watched is not None:
                response.watched.append(logprobs[list(params.watch_ids)].tolist())
            if token in self.stop_ids:
                response.finish_reason = "eos"
                break
            if any(text in self.tokenizer.decode(response.token_ids) for text in params.stop):
                response.finish_reason = "stop"
                break
        return response

    def _logits(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids], device=self.model.device)).logits[0, -1].float().cpu()

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        self.health()
        return torch.stack([torch.cat([self._behind(sequence, b) for b in branches]) for sequence in sequences])

    def _behind(self, sequence: list[int], branch: Branch) -> Tensor:
        return self._logits([*sequence, *branch.path]).log_softmax(-1)[list(branch.ids)]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = None  # nothing is served from a mixture of old and new weights
        own = self.model.state_dict()
        for name, tensor in tensors:
            own[name].copy_(tensor)
        self.version = version

    def health(self) -> None:
        if self.version is None:
            raise EngineError("the engine has no complete weights: call update_weights() first, or again")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


register_engine("plain", on_every_rank=True)(PlainEngine)
