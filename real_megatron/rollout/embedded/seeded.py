"""Sampling that depends on a sequence's own seed only, as a logits processor for transformers' `generate`."""

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessor

from real_megatron import progress


def uniforms(seed: int, sample: int, length: int) -> np.ndarray:
    """`length` uniforms in [0, 1) for sample number `sample` of a prompt with this seed (float64).

    A shorter request is a prefix of a longer one (Philox, counter based).
    """
    key = np.array([seed % 2**64, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length)


class SeededTokens(LogitsProcessor):
    """Picks each row's token by inverse CDF of the row's own uniforms and leaves it as the only finite logit.

    `generate` then runs greedily, and neither batch composition nor a global generator influences the choice. Records
    log_softmax(logits / T) of the chosen tokens, before top-p; for temperature 0: the argmax, and T = 1.

    uniforms: float64 [rows, max_new_tokens]
    watch: ids [W] whose log-probability is recorded too, or None
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float, watch: Tensor | None = None) -> None:
        self._uniforms = uniforms
        self._temperature = temperature
        self._top_p = top_p
        self._watch = watch
        self._logprobs: list[Tensor] = []
        self._watched: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self._logprobs)
        progress.mark()
        if self._temperature == 0:
            logprobs = scores.log_softmax(-1)
            chosen = scores.argmax(-1, keepdim=True)
        else:
            logprobs = (scores / self._temperature).log_softmax(-1)
            chosen = self._draw(logprobs.exp(), self._uniforms[:, step : step + 1])
        self._logprobs.append(logprobs.gather(1, chosen).squeeze(1))
        if self._watch is not None:
            self._watched.append(logprobs.index_select(1, self._watch))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _draw(self, probs: Tensor, uniform: Tensor) -> Tensor:
        if self._top_p >= 1:
            return _inverse_cdf(probs.cumsum(-1, dtype=torch.float64), uniform)
        ordered, index = probs.sort(stable=True, dim=-1, descending=True)
        cdf = ordered.cumsum(-1, dtype=torch.float64)
        # The nucleus: the shortest prefix whose mass reaches top_p, so the token that crosses the line is in it.
        nucleus = torch.where(cdf - ordered < self._top_p, cdf, 0.0).amax(-1, keepdim=True)
        return index.gather(1, _inverse_cdf(cdf.clamp(max=nucleus), uniform))

    def logprobs(self) -> Tensor:
        """fp32 `[rows, steps]`."""
        return torch.stack(self._logprobs, dim=1)

    def watched(self) -> Tensor | None:
        """fp32 `[rows, steps, W]`."""
        return torch.stack(self._watched, dim=1) if self._watch is not None else None


def _inverse_cdf(cdf: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds `uniform` times the total: `[rows, 1]`."""
    target = uniform * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
