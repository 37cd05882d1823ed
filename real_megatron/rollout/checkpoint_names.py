"""Which tensors a checkpoint has, to hold a weight stream against: servers drop unknown names in silence."""

import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

_SHOWN = 5
_HEAD = "lm_head.weight"


@lru_cache(maxsize=4)
def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a directory's safetensors files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_names(model_dir: Path, sent: Mapping[str, list[int]], tied: bool) -> None:
    """Raise ValueError unless `sent` (name -> shape) is exactly the checkpoint's set of tensors.

    tied: the output layer is the embedding; `lm_head.weight` may then be on one side only, as some store it

    A directory without safetensors (nothing to compare with) passes.
    """
    expected = dict(checkpoint_shapes(model_dir))
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
        raise ValueError(f"the weight stream is not the checkpoint {model_dir}: " + "; ".join(found))
