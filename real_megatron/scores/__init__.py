"""The score scale: score texts as a tree of token ids, their values, and the anchor before them. No torch."""

from real_megatron.scores.aspects import Aspect, weighted_mean
from real_megatron.scores.nearest import TIE, nearest_score
from real_megatron.scores.scale import EOS, ScoreScale
from real_megatron.scores.texts import CONTEXT, decode
from real_megatron.scores.tree import Branch, ScoreTree

__all__ = [
    "CONTEXT",
    "EOS",
    "TIE",
    "Aspect",
    "Branch",
    "ScoreScale",
    "ScoreTree",
    "decode",
    "nearest_score",
    "weighted_mean",
]
