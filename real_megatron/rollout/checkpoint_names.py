"""Which tensors a checkpoint has, to hold a weight stream against: servers drop unknown names in silence."""

import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

_SHOWN = 5


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


def check_names(model_dir: Path, sent: Mapping[str, list[int]]) -> None:
    """Raise ValueError unless `sent` (name -> shape) is exactly the checkpoint's set of tensors.

    `lm_head.weight` may be on one side only: a tied head is stored by some and not by others. A directory without
    safetensors (nothing to compare with) passes.
    """
    expected = dict(checkpoint_shapes(model_dir))
    if not expected:
        return
    for name in ("lm_head.weight",):
        if name not in expected or name not in sent:
            expected.pop(name, None)
            sent = {k: v for k, v in sent.items() if k != name}
    problems = {
        "missing": sorted(expected.keys() - sent.keys()),
        "unknown": sorted(sent.keys() - expected.keys()),
        "misshapen": sorted(k for k in expected.keys() & sent.keys() if tuple(sent[k]) != expected[k]),
    }
    found = [f"{len(v)} {k}: {', '.join(v[:_SHOWN])}{' …' * (len(v) > _SHOWN)}" for k, v in problems.items() if v]
    if found:
        raise ValueError(f"the weight stream is not the checkpoint {model_dir}: " + "; ".join(found))
