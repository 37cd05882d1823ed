"""The measured weak scaling beside its projection."""

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import scaling
from benchmarks.step_contenders import model_config
from real_megatron.hardware import GPUS

TINY = "--hidden 32 --ffn 64 --layers 1 --vocab 256 --head-dim 16 --heads 2 --kv-heads 1 --prompts 2".split()


def test_the_page_compares_ranks_with_the_fewest_and_with_the_projection(tmp_path, monkeypatch):
    args = scaling.parse(TINY)
    AutoModelForCausalLM.from_config(model_config(args)).save_pretrained(tmp_path)
    rows = {
        1: {"seconds": [2.0, 2.5], "tokens": 1000.0, "load": 0.25},
        4: {"seconds": [4.0], "tokens": 4000.0, "load": 4.0},
    }

    def shown() -> list[list[str]]:
        lines = scaling.page(rows, args, str(tmp_path), 1000, [])
        return [line.strip("| ").split(" | ") for line in lines if line.startswith(("| 1 ", "| 4 "))]

    assert shown() == [
        ["1", "2.00", "2.50", "1,000", "500", "1.00", "–", "–", "0.2"],
        ["4", "4.00", "4.00", "4,000", "1,000", "0.50", "–", "–", "4.0"],
    ]
    monkeypatch.setattr(scaling, "gpu_here", lambda: GPUS["H100"])
    one, four = (scaling.projected(ranks, args, str(tmp_path), GPUS["H100"]) for ranks in (1, 4))
    assert one < four
    assert shown()[1][-3:-1] == [f"{four:.2f}", f"{one / four:.2f}"]
    for row in rows.values():  # as a GPU has it
        row |= {"peak": 3 * 2**30, "planned": 2.5 * 2**30}
    assert shown()[1][-2:] == ["3.00", "2.50"]


@pytest.mark.parametrize(
    ("reported", "known"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA H100 PCIe", None), ("Tesla T4", None)],
)
def test_only_a_gpu_of_the_table_has_a_projection(reported, known, monkeypatch):
    monkeypatch.setattr(scaling, "DEVICE", "cuda")
    monkeypatch.setattr(scaling.torch.cuda, "get_device_name", lambda: reported)
    found = scaling.gpu_here()
    assert (found and found.name) == known
