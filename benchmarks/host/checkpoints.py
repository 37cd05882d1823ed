"""Saving a checkpoint and resuming from it: the optimizer's state gathered and read whole, or by each rank its part.

    python -m benchmarks.host.checkpoints --ranks 2 8 32

Up to 8 ranks a small model is trained, saved and loaded; the numbers of more ranks, and of large models, are counted
from sizes (`counted`), which a test compares with what is measured. Before: Megatron's `fully_reshardable`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from benchmarks.host.ranks import run
from benchmarks.host.row import Row
from real_megatron.bridge import describe
from real_megatron.config import RunConfig
from real_megatron.planning.states import state_bytes
from real_megatron.planning.workload import Layout
from real_megatron.policy import checkpoint, cpu
from real_megatron.policy.megatron_versions import load_sharded
from real_megatron.policy.optimizer import allocate_moments, chained, is_torch_adam, steps_everywhere
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreTree

SAVING, RESUMING = "saving a checkpoint", "resuming from a checkpoint"
MEASURED_RANKS = 8
GATHERED = {**checkpoint.METADATA, "distrib_optim_fully_reshardable_mem_efficient": True}
MODEL = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    tie_word_embeddings=True,
)
CONFIGS = Path(__file__).parents[2] / "tests/fixtures/configs"
LARGE = {
    "Qwen3-32B": (32, {"tensor": 8, "sequence_parallel": True}),
    "Qwen3-235B-A22B": (256, {"pipeline": 4, "expert": 8, "account_for_embedding": True, "account_for_loss": True}),
}
"""GPUs and layout."""


def rows(ranks: int) -> list[Row]:
    """Both parts, before and after, by data parallelism alone; on 8 ranks also with tensor parallelism over 2."""
    layouts = {"": {}, ", TP2 DP4": {"tensor": 2}} if ranks == 8 else {"": {}}
    if ranks > MEASURED_RANKS:
        found = []
        large = {name: size for name, size in LARGE.items() if size[0] == ranks}
        for name, (world, parallel) in {"": (ranks, {}), **large}.items():
            hf = (
                AutoConfig.for_model(**json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
                if name
                else MODEL
            )
            config = run_config("", parallel, "bfloat16" if name else "float32")
            found += counted(Layout(describe(hf), config.parallel, config.model, world), f", {name}" if name else "")
        return found
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).save_pretrained(scratch)
        for suffix, parallel in layouts.items():
            measured = run(ranks, measure, run_config(scratch, parallel), Path(scratch))
            for part, variant in measured[0]:
                costs = [one[part, variant] for one in measured]
                most = [max(cost[i] for cost in costs) for i in range(3)]
                found.append(Row(part + suffix, variant, ranks, most[0], most[1], most[2], "measured"))
    return found


def counted(layout: Layout, suffix: str = "") -> list[Row]:
    """The bytes of both parts for the rank that has most. The optimizer keeps three float32 numbers an element."""
    whole = Layout(
        layout.description,
        layout.parallel.model_copy(update={"distributed_optimizer": False}),
        layout.model,
        layout.world,
    )
    kept = (
        8 if layout.model.dtype == "float32" else 12
    )  # of an element, by state_bytes: weights in float32 are no copies
    found = []
    for stage in range(layout.parallel.pipeline):
        mine, shard = state_bytes(layout, stage), state_bytes(whole, stage)
        part, all_parts = (state.optimizer / kept * 12 for state in (mine, shard))
        found.append((shard.weights, part, all_parts))
    weights, part, all_parts = max(found, key=sum)
    row = partial(Row, ranks=layout.world, seconds=None, how="counted")
    return [
        row(SAVING + suffix, "before", moved=all_parts - part, held=all_parts),
        row(SAVING + suffix, "after", moved=0, held=part),
        row(RESUMING + suffix, "before", moved=weights + all_parts, held=all_parts),
        row(RESUMING + suffix, "after", moved=weights + part, held=0),
    ]


def run_config(model: str, parallel: dict[str, Any], dtype: str = "float32") -> RunConfig:
    """Of a run of the model at a layout, as far as a policy reads it."""
    return RunConfig.model_validate({"model": {"path": model, "dtype": dtype}, "parallel": parallel})


# --- on a rank ------------------------------------------------------------------------------------------------------


def measure(config: RunConfig, scratch: Path) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(part, variant) → seconds, bytes received or read, bytes held."""
    policy = Policy(config, ScoreTree.of_tokens([1, 2]), [1.0, 2.0], total_updates=10)
    policy.allocate_optimizer_state()
    parts = optimizer_bytes(policy)
    whole = parts.clone()
    dist.all_reduce(whole)
    # Of the ranks of a model shard; data-parallel ranks follow one another between those of tensor parallelism.
    whole = float(whole.item()) / config.parallel.tensor
    part, first = float(parts.item()), dist.get_rank() < config.parallel.tensor
    found = {}
    for variant, save, load in (("before", save_gathered, load_whole), ("after", Policy.save, Policy.load)):
        directory = scratch / f"{variant}{config.parallel.tensor}"
        with patch.object(dist, "gather", counting(dist.gather)) as gather:
            seconds = timed(partial(save, policy, directory, {}))
        held = (whole if first else 0.0) if variant == "before" else part
        found[SAVING, variant] = seconds, float(gather.received), held
        load(policy, directory)  # modules are imported at first
        before = bytes_read()
        seconds = timed(partial(load, policy, directory))
        found[RESUMING, variant] = seconds, float(bytes_read() - before), whole if variant == "before" else 0.0
    return found


def optimizer_bytes(policy: Policy) -> torch.Tensor:
    """Bytes of this rank's part of the optimizer's state."""
    models = checkpoint.model_state_to_load(policy.chunks)
    shards = checkpoint.optimizer_shards(chained(policy.optimizer), models)
    return torch.tensor(sum(piece.data.nbytes for piece in shards.values()), dtype=torch.float64)


def bytes_read() -> int:
    """By this process so far, through calls of `read`."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def timed(work: Callable[[], Any]) -> float:
    """Seconds from when all ranks begin until the last is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


class counting:
    """`dist.gather`, which also counts the bytes that this rank receives from others."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real, self.received = real, 0

    def __call__(self, tensor: Any, gather_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.received += sum(one.nbytes for one in (gather_list or ())[1:])
        return self._real(tensor, gather_list, *args, **kwargs)


# --- before ---------------------------------------------------------------------------------------------------------


def save_gathered(policy: Policy, directory: Path, state: dict[str, Any]) -> None:
    """`Policy.save` as it was: a data-parallel rank gathers and writes the state of its model shard."""

    def gathered(optimizer: Any, models: dict[str, Any]) -> dict[str, Any]:
        return {"optimizer": optimizer.sharded_state_dict(models, metadata=dict(GATHERED))}

    with patch.object(checkpoint, "_optimizer_to_save", gathered):
        policy.save(directory, state)


def load_whole(policy: Policy, directory: Path) -> None:
    """Weights and optimizer as `Policy.load` read them: the state of the model shard on each rank, of which it keeps
    its part."""
    optimizer = policy.optimizer
    allocate_moments(chained(optimizer))
    with (
        cpu.device_mode(),
        steps_everywhere(optimizer),
        patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_with_step),
    ):
        sharded = checkpoint.model_state_to_load(policy.chunks)
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=dict(GATHERED))
        loaded = load_sharded(sharded, directory)
        for index, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{index}"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])


_set = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_with_step(adam: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
    """Megatron-Core looks for the `step` of torch's Adam among the tensors that were saved."""
    if is_torch_adam(adam.optimizer):
        tensors = {"step": adam._get_main_param_and_optimizer_states(parameter)["step"], **tensors}
    _set(adam, parameter, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 256])
    for ranks in parser.parse_args().ranks:
        for row in rows(ranks):
            print(row)


if __name__ == "__main__":
    main()
