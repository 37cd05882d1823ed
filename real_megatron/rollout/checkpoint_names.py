"""Which tensors a checkpoint has, to compare a weight stream with: servers ignore unknown names silently."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from real_megatron.errors import EngineError
from real_megatron.hf.checkpoint import ROTARY, HFCheckpoint, Shape, has_weights

_SHOWN = 5
_HEAD = "lm_head.weight"


@lru_cache(maxsize=4)
def checkpoint_shapes(model_dir: Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint; none where a directory holds no weights."""
    return HFCheckpoint(model_dir).shapes if has_weights(model_dir) else {}


def check_names(model_dir: Path, sent: Mapping[str, list[int]], tied: bool) -> None:
    """Raise EngineError unless `sent` (name -> shape) is exactly the checkpoint's set of tensors.

    tied: the output layer is the embedding; `lm_head.weight` may then be on one side only, as some store it

    A directory without weights (nothing to compare with) passes.
    """
    expected = {name: shape for name, shape in checkpoint_shapes(model_dir).items() if not name.endswith(ROTARY)}
    if not expected:
        return
    if tied:
        expected.pop(_HEAD, None)
        sent = {name: shape for name, shape in sent.items() if name != _HEAD}
    problems = {
        "missing": sorted(expected.keys() - sent.keys()),
        "unknown": sorted(sent.keys() - expected.keys()),
        "misshapen": sorted(k for k in expected.keys() & sent.keys() if tuple(sent[k]) != expected[k]),
    }
    found = [f"{len(v)} {k}: {', '.join(v[:_SHOWN])}{' …' * (len(v) > _SHOWN)}" for k, v in problems.items() if v]
    if found:
        raise EngineError(f"the weight stream is not the checkpoint {model_dir}: " + "; ".join(found))
