"""Every family at many parallel layouts: logits equal transformers', exports equal the files, any checkpoint loads.

All worlds are checked in one call of four ranks, whose start-up dominates otherwise.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from real_megatron.bridge import convert_hf_to_megatron, convert_megatron_to_hf
from real_megatron.bridge.families import FAMILIES
from real_megatron.hf.checkpoint import HFCheckpoint
from tests.support.bridge_ranks import TOKENS, VARIANTS, Case, Findings, check_layouts, tiny_model
from tests.support.ranks import run_ranks

# float32 logits of magnitude about 1 after 4 layers: other summation orders of 64 to 192 products differ by some ulp
# (about 1e-6); a wrong weight by 1e-2 and more.
TOLERANCE = 1e-5

DENSE = {
    "tp1": {},
    "tp4": dict(tensor=4),
    "tp2 pp2": dict(tensor=2, pipeline=2),
    "pp2 vpp2": dict(pipeline=2, virtual_pipeline=2),
}
MOE = {
    "tp1": {},
    "tp4": dict(tensor=4),
    "tp2 pp2": dict(tensor=2, pipeline=2),
    "tp2 ep2": dict(tensor=2, expert=2, sequence_parallel=True),
    "pp2 vpp2 ep2": dict(pipeline=2, virtual_pipeline=2, expert=2),
}
LAYOUTS = {variant: MOE if "mo" in variant or "mixtral" in variant else DENSE for variant in VARIANTS}
# The layout at which Megatron writes a checkpoint, to be converted back.
SAVED = "tp2 pp2"


def test_every_family_has_a_variant() -> None:
    # Other tests register families of their own.
    built_in = {name for name in FAMILIES if getattr(FAMILIES[name], "__name__", "").startswith("real_megatron.")}
    assert {fields["model_type"] for fields in VARIANTS.values()} == built_in


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def findings(root: Path) -> Callable[[str, str], list[Findings]]:
    """All ranks' findings of a variant at a layout."""
    cases = {}
    for variant, layouts in LAYOUTS.items():
        model = tiny_model(variant)
        hf = root / variant
        model.save_pretrained(hf)
        with torch.no_grad():
            logits = model(TOKENS).logits
        expert = 2 if layouts is MOE else 1
        whole, divided = root / f"{variant} whole", root / f"{variant} divided"
        convert_hf_to_megatron(hf, whole, vocab_multiple=16, workers=1, progress=False)
        convert_hf_to_megatron(
            hf, divided, tensor=4, pipeline=2, expert=expert, vocab_multiple=16, workers=1, progress=False
        )
        for label, sizes in layouts.items():
            case = Case(str(hf), sizes, logits, [str(whole), str(divided)])
            if label == SAVED:
                case.save = str(root / f"{variant} saved")
                case.buckets = [1, 2**30]
            cases[variant, label] = case
    keys = sorted(cases, key=lambda key: key[1])
    ranks = run_ranks(4, check_layouts, [cases[key] for key in keys])
    position = {key: i for i, key in enumerate(keys)}
    return lambda variant, label: [rank[position[variant, label]] for rank in ranks]


@pytest.mark.parametrize(("variant", "label"), [(v, label) for v in VARIANTS for label in LAYOUTS[v]])
def test_logits_and_export(findings: Callable, variant: str, label: str) -> None:
    ranks = findings(variant, label)
    assert [rank.export_faults for rank in ranks] == [[]] * 4
    seen = [rank.differences for rank in ranks if rank.differences["hf"] is not None]
    assert len(seen) == (2 if "pp2" in label else 4), "the last stage's ranks, and only they, have logits"
    for differences in seen:
        assert len(differences) == 3
        # NaN compares false.
        assert all(difference <= TOLERANCE for difference in differences.values()), differences


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatrons_own_checkpoint_converts_back(findings: Callable, root: Path, variant: str) -> None:
    findings(variant, SAVED)
    back = root / f"{variant} back"
    convert_megatron_to_hf(root / f"{variant} saved", back, hf_path=root / variant, workers=1, progress=False)
    first, second = HFCheckpoint(root / variant), HFCheckpoint(back)
    assert first.entries.keys() == second.entries.keys()
    for name in first.entries:
        assert torch.equal(first.tensor(name), second.tensor(name)), name
