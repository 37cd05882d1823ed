"""Streaming Hugging Face checkpoint tensors into a live transformers model, in place."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from real_megatron.errors import EngineError

# transformers 5 keeps the experts of a layer in two fused parameters, `gate_up_proj` [E, 2I, H] and `down_proj`
# [E, H, I]; checkpoints (and so the stream) have one matrix per expert.
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "default": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_FUSED = re.compile(r"(.*\.)mlp\.experts\.(gate_up_proj|down_proj)$")
_SHOWN = 5


def _destinations(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Checkpoint name -> view of the live parameter that it fills, and tied name -> the name that owns the storage."""
    model_type = getattr(model.config, "model_type", "")
    block, gate, up, down = _EXPERT_NAMES.get(model_type, _EXPERT_NAMES["default"])
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        data = parameter.data
        fused = _FUSED.match(name)
        if fused and data.dim() == 3:
            prefix = f"{fused[1]}{block}.experts"
            for expert in range(data.shape[0]):
                if fused[2] == "gate_up_proj":
                    half = data.shape[1] // 2
                    views[f"{prefix}.{expert}.{gate}.weight"] = data[expert, :half]
                    views[f"{prefix}.{expert}.{up}.weight"] = data[expert, half:]
                else:
                    views[f"{prefix}.{expert}.{down}.weight"] = data[expert]
        elif model_type == "mixtral":
            views[name.replace(".mlp.", ".block_sparse_moe.")] = data
        else:
            views[name] = data
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            views[name] = buffer
    owner = {id(p): name for name, p in model.named_parameters()}
    tied = {
        name: owner[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if owner.get(id(p), name) != name
    }
    return views, tied


def copy_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a stream of (Hugging Face checkpoint name, full tensor) into `model`, casting to its dtypes.

    A tied weight may come under either name, or under both. The whole stream is consumed before anything is raised.

    Raises EngineError naming unknown, misshapen and missing tensors; the model then holds a mixture of weights.
    """
    views, tied = _destinations(model)
    seen: set[str] = set()
    unknown: list[str] = []
    misshapen: list[str] = []
    with torch.no_grad():
        for name, tensor in tensors:
            target = tied.get(name, name)
            view = views.get(target)
            if view is None:
                unknown.append(name)
            elif view.shape != tensor.shape:
                misshapen.append(f"{name} {list(tensor.shape)} (the model has {list(view.shape)})")
            else:
                view.copy_(tensor)
                seen.add(target)
    problems = {"unknown": unknown, "misshapen": misshapen, "missing": sorted(views.keys() - seen)}
    found = [f"{len(v)} {k}: {', '.join(v[:_SHOWN])}{' …' * (len(v) > _SHOWN)}" for k, v in problems.items() if v]
    if found:
        raise EngineError(f"weights do not fit {type(model).__name__}: " + "; ".join(found))
