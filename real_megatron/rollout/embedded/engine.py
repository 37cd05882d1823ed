"""The embedded engine: transformers' `generate` with its KV cache, in the trainer's own process, on CPU or GPU."""

import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from real_megatron import progress
from real_megatron.errors import EngineError, PromptRefused
from real_megatron.hf.model import load_model
from real_megatron.hf.rotary import longest_sequence
from real_megatron.hf.stop_ids import stop_ids
from real_megatron.rollout.embedded.branches import branch_logprobs, furthest_paths, positions
from real_megatron.rollout.embedded.head import use_float32_logits
from real_megatron.rollout.embedded.seeded import SeededTokens, uniforms
from real_megatron.rollout.embedded.stop import StopAutomaton, StopTexts
from real_megatron.rollout.embedded.weights import copy_weights
from real_megatron.rollout.engine import EngineSpec, Response, SamplingParams, check_ids, register_engine
from real_megatron.scores import Branch

logger = logging.getLogger(__name__)


class TransformersEngine:
    """RolloutEngine on a Hugging Face model.

    Sampling is reproducible: given weights, a prompt, its seed and the sample's number k decide the tokens (up to ties
    within floating-point error of the logits, which depend on batch shape in the last bit).
    """

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
        stop_ids: Sequence[int] | None = None,
        fp32_logits: bool = True,
    ) -> None:
        """An engine without weights: `update_weights` must come before the first `generate`.

        stop_ids: end-of-sequence tokens; default: the tokenizer's
        fp32_logits: float32 logits where the weights have 16 bits, as the policy's head has them
        """
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if stop_ids is None:
            stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._init(model, tokenizer, batch_size, stop_ids, fp32_logits)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
        fp32_logits: bool = True,
    ) -> "TransformersEngine":
        """An engine that serves a checkpoint directory as weight version 0."""
        engine = cls.__new__(cls)
        model = load_model(directory, dtype)
        ends = stop_ids(Path(directory), tokenizer)
        engine._init(model.to(device), tokenizer, batch_size, ends, fp32_logits)
        engine.version = 0
        return engine

    def _init(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        stop_ids: Sequence[int],
        fp32_logits: bool,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if fp32_logits:
            use_float32_logits(self.model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.version: int | None = None
        """Version of the weights served; None before the first sync and after a failed one."""
        self._device = model.device
        self._asleep = False
        self._automata: dict[tuple[str, ...], StopAutomaton] = {}
        self._eos = list(stop_ids)
        # `generate` fills what a call leaves unset from the model's own defaults (top_k, repetition penalty, …).
        model.generation_config = GenerationConfig()

    # --- the protocol -----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        version = self._served_version()
        seeds = [secrets.randbits(63) for _ in prompts] if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
        self._check(prompts, params.max_new_tokens)
        results: list[list[Response]] = [[] for _ in prompts]
        # Prompts of one length together, so that little is padded; a prompt is prefilled once for all its samples.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with torch.inference_mode():
            for samples in _ranges(params.n, self.batch_size):
                for chunk in _chunks(order, max(1, self.batch_size // len(samples))):
                    batch = self._generate(
                        [prompts[i] for i in chunk], [seeds[i] for i in chunk], samples, params, version
                    )
                    for row, i in enumerate(chunk):
                        results[i].extend(batch[row * len(samples) : (row + 1) * len(samples)])
        return results

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        self.health()
        paths = furthest_paths(branches)
        self._check(sequences, max(map(len, paths), default=0))
        result = torch.empty(len(sequences), sum(len(branch.ids) for branch in branches))
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        with torch.inference_mode():
            for chunk in _chunks(order, max(1, self.batch_size // max(1, len(paths)))):
                progress.mark()
                tokens, mask = self._left_pad([sequences[i] for i in chunk])
                result[chunk] = branch_logprobs(self.model, tokens, mask, branches, paths, self.batch_size).cpu()
        return result

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.wake()
        self.version = None
        copy_weights(self.model, tensors)
        self.version = version

    def sleep(self) -> None:
        """Move the weights to the host and release the device's cached memory. Nothing to do on a CPU."""
        if self._device.type != "cpu" and not self._asleep:
            self.model.to("cpu")
            torch.cuda.empty_cache()
        self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self.model.to(self._device)
        self._asleep = False

    def health(self) -> None:
        self._served_version()

    def close(self) -> None:
        """Drop the model."""
        self.version = None
        self.model = None

    def _served_version(self) -> int:
        if self._asleep:
            raise EngineError("the engine sleeps: call wake() first")
        if self.version is None:
            raise EngineError("the engine has no complete weights: call update_weights() first, or again")
        return self.version

    # --- one batch --------------------------------------------------------------------------------------------------

    def _generate(
        self, prompts: list[list[int]], seeds: list[int], samples: range, params: SamplingParams, version: int
    ) -> list[Response]:
        """`len(samples)` responses per prompt, prompt-major."""
        draws = np.stack([uniforms(seed, k, params.max_new_tokens) for seed in seeds for k in samples])
        watch = torch.tensor(params.watch_ids, device=self._device) if params.watch_ids else None
        chooser = SeededTokens(torch.from_numpy(draws).to(self._device), params.temperature, params.top_p, watch)
        stop = StopTexts(self._automaton(params.stop), len(draws)) if params.stop else None
        tokens, mask = self._left_pad(prompts)
        cache = DynamicCache(config=self.model.config)
        width = tokens.shape[1]
        if width > 1 and len(samples) > 1:
            # Everything but the last prompt token once per prompt; `generate` continues from the repeated cache.
            self.model(
                input_ids=tokens[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions(mask[:, :-1]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(len(samples))
        eos = torch.tensor(self._eos or [-1], device=self._device)
        sequences = self.model.generate(
            input_ids=tokens.repeat_interleave(len(samples), dim=0),
            attention_mask=mask.repeat_interleave(len(samples), dim=0),
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=params.max_new_tokens,
                do_sample=False,
                eos_token_id=self._eos or None,
                pad_token_id=self._eos[0] if self._eos else 0,
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        )
        generated = sequences[:, width:]
        ended = torch.isin(generated, eos)
        reached = stop.hits() if stop else torch.zeros_like(ended)
        return _collect(generated, chooser, ended, reached, version)

    def _automaton(self, stops: tuple[str, ...]) -> StopAutomaton:
        if stops not in self._automata:
            vocab_size = self.model.get_output_embeddings().weight.shape[0]
            self._automata[stops] = StopAutomaton(self.tokenizer, stops, vocab_size).to(self._device)
        return self._automata[stops]

    def _left_pad(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        tokens = np.zeros((len(sequences), width), dtype=np.int64)
        mask = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, width - len(sequence) :] = sequence
            mask[row, width - len(sequence) :] = 1
        return torch.from_numpy(tokens).to(self._device), torch.from_numpy(mask).to(self._device)

    def _check(self, sequences: Sequence[list[int]], more: int) -> None:
        limit = longest_sequence(self.model.config) or math.inf
        check_ids(sequences, self.model.config.get_text_config().vocab_size, self.tokenizer)
        for i, sequence in enumerate(sequences):
            if len(sequence) + more > limit:
                raise PromptRefused(
                    i,
                    f"the sequence has {len(sequence)} tokens; with {more} new ones it exceeds the model's {limit} "
                    "positions (config.json: max_position_embeddings, or what rope_type allows): lower "
                    "data.max_prompt_tokens or data.max_response_tokens",
                )


@register_engine("transformers", on_every_rank=True)
def build(spec: EngineSpec) -> TransformersEngine:
    """The engine of a checkpoint's architecture, with its weights where `spec.serve_loaded`."""
    options: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype, "batch_size": spec.config.batch_size}
    options["fp32_logits"] = spec.fp32_logits
    if spec.serve_loaded:
        return TransformersEngine.from_pretrained(spec.model_dir, spec.tokenizer, **options)
    return TransformersEngine(spec.hf_config(), spec.tokenizer, stop_ids=spec.stop_ids(), **options)


def _collect(generated: Tensor, chooser: SeededTokens, ended: Tensor, reached: Tensor, version: int) -> list[Response]:
    """End each row at its first end-of-sequence token or completed stop text.

    generated: ids [rows, steps]; ended, reached: bool [rows, steps], True from (reached) or at (ended) the event.
    """
    over = ended | reached
    steps = generated.shape[1]
    finished = over.any(1)
    last = torch.where(finished, over.int().argmax(1), steps - 1)
    stopped = reached.gather(1, last[:, None]).squeeze(1)
    columns = (generated, chooser.logprobs(), last, finished, stopped)
    watched = chooser.watched()
    return [
        Response(
            token_ids=ids[: end + 1],
            logprobs=values[: end + 1],
            finish_reason="stop" if stop else "eos" if done else "length",
            weight_version=version,
            watched=None if watched is None else watched[row, : end + 1].tolist(),
        )
        for row, (ids, values, end, done, stop) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]


def _chunks(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _ranges(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
