"""Each rank writes and reads its own part of the optimizer's state, which any layout can read."""

from itertools import combinations_with_replacement
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.host.checkpoints import MODEL, RESUMING, SAVING, counted, measure, run_config
from real_megatron.bridge import describe
from real_megatron.planning.workload import Layout
from real_megatron.policy.optimizer_shards import boxes
from tests.support.checkpoint_ranks import old_and_new, save_and_go_on
from tests.support.kills import tensors_of
from tests.support.policy_ranks import make_config, write_checkpoint
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2), (1, 3), (3, 1)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start, end in combinations_with_replacement(range(prod(shape) + 1), 2):
        found = list(boxes(shape, start, end))
        parts = [
            whole[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))].flatten() for offset, size in found
        ]
        assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *parts]), torch.arange(start, end))
        assert len(found) <= 2 * len(shape) - 1


def test_what_megatrons_own_type_has_written_is_read_bit_by_bit_and_the_other_way_round(tmp_path: Path) -> None:
    """The old checkpoints of a run go on; 16-bit weights, whose float32 copies are the optimizer's."""
    config = make_config(write_checkpoint(tmp_path / "hf"), model={"dtype": "bfloat16"})
    for differences in run_ranks(2, old_and_new, config, tmp_path):
        assert differences == {"moved by a step": True, "old by new": [], "new by old": [], "new by new": []}


def test_a_rank_reads_its_own_bytes_alone(tmp_path: Path) -> None:
    """By count: within 1.2 × the weights of its model shard and its part of the optimizer's state. The rest is what
    each piece of a file begins and ends with. Megatron's own type reads all parts, and gathers them for a save."""
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).save_pretrained(tmp_path)
    config = run_config(str(tmp_path), {})
    expected = {
        (row.part, row.variant): row for row in counted(Layout(describe(MODEL), config.parallel, config.model, 2))
    }
    for rank, costs in enumerate(run_ranks(2, measure, config, tmp_path)):
        for (part, variant), (_, moved, held) in costs.items():
            most, most_held = expected[part, variant].moved, expected[part, variant].held
            if part == RESUMING:
                assert most < moved <= 1.2 * most
            else:
                assert moved == pytest.approx(most if rank == 0 else 0, rel=1e-3)
            if (part, variant, rank) != (SAVING, "before", 1):
                assert held == pytest.approx(most_held, rel=1e-3)
    assert expected[RESUMING, "before"].moved > 1.5 * expected[RESUMING, "after"].moved


def test_what_is_written_while_training_goes_on_is_the_state_from_before(tmp_path: Path) -> None:
    config = make_config(write_checkpoint(tmp_path / "hf"))
    (first, said), (second, _) = run_ranks(2, save_and_go_on, config, tmp_path)
    assert first and second
    assert "a process that writes the checkpoint was killed by SIGKILL" in said
    expected = tensors_of(tmp_path / "at once")
    assert len(expected) > 100 and tensors_of(tmp_path / "beside") == expected
