"""Offline conversion: bits, dtypes, layouts, side files, faults, and processes."""

import json
import multiprocessing as mp
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from real_megatron.bridge import convert as convert_module
from real_megatron.bridge import convert_hf_to_megatron, convert_megatron_to_hf, describe, dry_run, parameter_count
from real_megatron.bridge.torch_dist import TorchDistCheckpoint
from real_megatron.config import RunConfig
from real_megatron.data.byte_model import make_byte_model
from real_megatron.errors import CheckpointError, ConfigError, UnsupportedModel
from real_megatron.hf.checkpoint import HFCheckpoint, check_servers_read_the_same
from real_megatron.hf.model import load_model
from real_megatron.hf.side_files import read_config
from real_megatron.judging.judge import Judge
from real_megatron.training.export import write_run
from tests.support.bridge_ranks import VARIANTS, tiny_model

QUIET = dict(workers=1, progress=False)
LAYOUTS = [dict(), dict(tensor=4, pipeline=2, expert=4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant as a Hugging Face checkpoint."""
    root = tmp_path_factory.mktemp("models")
    for variant in VARIANTS:
        tiny_model(variant).save_pretrained(root / variant)
        (root / variant / "tokenizer.json").write_text("{}")
        (root / variant / "modeling_evil.py").write_text("raise SystemExit")
    return root


def equal(first: Path, second: Path) -> bool:
    a, b = HFCheckpoint(first), HFCheckpoint(second)
    return a.entries.keys() == b.entries.keys() and all(
        a.entries[n].dtype == b.entries[n].dtype and torch.equal(a.tensor(n), b.tensor(n)) for n in a.entries
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back_is_bit_identical(
    models: Path, tmp_path: Path, variant: str, layout: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mo" not in variant and "mixtral" not in variant:
        layout = {k: v for k, v in layout.items() if k != "expert"}
    # Files and blocks so small that every tensor is divided.
    monkeypatch.setattr(convert_module, "MEGATRON_FILE_BYTES", 100_000)
    monkeypatch.setattr(convert_module, "BLOCK_BYTES", 2_000)
    done = convert_hf_to_megatron(models / variant, tmp_path / "m", **layout, **QUIET)
    assert done.files == len(list((tmp_path / "m").glob("*.distcp"))) > 4
    back = convert_megatron_to_hf(tmp_path / "m", tmp_path / "h", max_file_bytes=100_000, **QUIET)
    assert back.files == len(list((tmp_path / "h").glob("*.safetensors"))) > 3
    assert equal(models / variant, tmp_path / "h")
    side = sorted(p.name for p in (tmp_path / "h").iterdir() if "safetensors" not in p.name)
    assert side == ["config.json", "generation_config.json", "tokenizer.json"]
    assert (tmp_path / "h" / "config.json").read_text() == (models / variant / "config.json").read_text()


def test_processes_write_the_same_as_one(models: Path, tmp_path: Path) -> None:
    source = models / "qwen3_moe"
    convert_hf_to_megatron(source, tmp_path / "one", tensor=2, expert=2, **QUIET)
    convert_hf_to_megatron(source, tmp_path / "two", tensor=2, expert=2, workers=2, progress=False)
    files = sorted(p.name for p in (tmp_path / "one").glob("*.distcp"))
    assert len(files) == 4 and files == sorted(p.name for p in (tmp_path / "two").glob("*.distcp"))
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    convert_megatron_to_hf(tmp_path / "two", tmp_path / "h", max_file_bytes=300_000, workers=2, progress=False)
    assert equal(source, tmp_path / "h")


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe"])
def test_files_hold_the_layers_of_their_pipeline_stage(models: Path, tmp_path: Path, variant: str) -> None:
    """File `__<rank>_…`: stage r of 4 holds layer r; the first also the embedding, the last also the output layer."""
    convert_hf_to_megatron(models / variant, tmp_path / "m", pipeline=4, **QUIET)
    metadata = TorchDistCheckpoint(tmp_path / "m").metadata
    found: dict[int, set[str | int]] = {rank: set() for rank in range(4)}
    for index, info in metadata.storage_data.items():
        rank = int(info.relative_path.split("_")[2])
        if "_extra_state" in index.fqn:
            continue
        if index.fqn.startswith("decoder.layers."):
            number = index.fqn.split(".")[2]
            found[rank].add(int(number) if number.isdigit() else index.offset[0])
        else:
            found[rank].add(index.fqn.split(".")[-2])
    assert found == {
        0: {"word_embeddings", 0},
        1: {1},
        2: {2},
        3: {3, "final_layernorm", "output_layer"},
    }


def test_a_family_of_a_module_converts(tmp_path: Path, extension_family: str) -> None:
    config = AutoConfig.for_model(
        "granite",
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "granite")
    with pytest.raises(UnsupportedModel, match="model_type 'granite' is not supported"):
        convert_hf_to_megatron(tmp_path / "granite", tmp_path / "m", **QUIET)
    family = f"{extension_family}:fancy"
    convert_hf_to_megatron(tmp_path / "granite", tmp_path / "m", family=family, tensor=2, **QUIET)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "h", family=family, **QUIET)
    assert equal(tmp_path / "granite", tmp_path / "h")
    assert str(dry_run(tmp_path / "granite", family=family).title).startswith(f"{family}: ")


def test_dtype_conversion(models: Path, tmp_path: Path) -> None:
    source = models / "qwen2"
    convert_hf_to_megatron(source, tmp_path / "m", dtype=torch.bfloat16, **QUIET)
    stored = TorchDistCheckpoint(tmp_path / "m").tensors.values()
    assert {entry.properties.dtype for entry in stored} == {torch.bfloat16}
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "h", **QUIET)
    expected = AutoModelForCausalLM.from_pretrained(source).bfloat16().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "h", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "wide", dtype=torch.float32, **QUIET)
    assert {e.dtype for e in HFCheckpoint(tmp_path / "wide").entries.values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_mixed_dtypes_that_megatron_stores_as_one(models: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.input_layernorm.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' is torch.bfloat16.*give a dtype"):
        convert_hf_to_megatron(tmp_path / "mixed", tmp_path / "m", **QUIET)
    convert_hf_to_megatron(tmp_path / "mixed", tmp_path / "m", dtype=torch.float32, **QUIET)


@pytest.mark.parametrize(
    ("variant", "layout", "message"),
    [
        ("qwen2", dict(tensor=3), r"tensor=3 is neither .* query groups; choose one of 1, 2\b"),
        ("mixtral", dict(tensor=16), "tensor=16 does not divide 'decoder.layers.0.*; choose one of 1, "),
        ("qwen2", dict(pipeline=3), "pipeline=3 does not divide the 4 layers of this model; choose one of 1, 2, 4$"),
        ("qwen2", dict(expert=2), "expert=2 .*has no experts"),
        ("mixtral", dict(expert=3), "expert=3 does not divide the 4 experts"),
    ],
)
def test_impossible_layouts(models: Path, tmp_path: Path, variant: str, layout: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_hf_to_megatron(models / variant, tmp_path / "m", **layout, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_report(models: Path, tmp_path: Path) -> None:
    done = convert_hf_to_megatron(models / "mistral", tmp_path / "m", **QUIET)
    assert done.parameters == parameter_count(describe(read_config(models / "mistral"))) == 132_032
    assert done.bytes >= 4 * done.parameters


def test_a_judge_there_and_back_is_asked_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scale, template, lengths and sampling are those of training."""
    source = make_byte_model(tmp_path / "judge", num_hidden_layers=1, initializer_range=0.2)
    (tmp_path / "own.txt").write_text("Which letter? {prompt}")
    keys = [
        f"data.template={tmp_path}/own.txt",
        "scale.scores=[A, B, C]",
        "scale.values=[0, 1, 5]",
        "scale.anchor='so: '",
    ]
    keys += ["data.max_response_tokens=8", "evaluation.temperature=0.7", "scale.probabilities=renormalized"]
    write_run(RunConfig.from_yaml(None, keys), source)
    convert_hf_to_megatron(source, tmp_path / "m", **QUIET)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "back", **QUIET)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "cast", dtype=torch.float32, **QUIET)
    make_byte_model(tmp_path / "plain", num_hidden_layers=1)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "beside", hf_path=tmp_path / "plain", **QUIET)
    scores = []
    for model in (source, *(tmp_path / name for name in ("back", "cast", "beside"))):
        with Judge.from_pretrained(model) as judge:
            assert (judge.scale.texts, judge.scale.anchor_text) == (["A", "B", "C"], "so: ")
            scores.append(judge.score(["one", "another"]))
    for found in scores[1:]:
        for score, expected in zip(found, scores[0], strict=True):
            assert (score.critique, score.sampled_score) == (expected.critique, expected.sampled_score)
            # Tensors at other places of the file, with another alignment: float32 sums in another order.
            assert score.distribution == pytest.approx(expected.distribution, rel=1e-5)
            assert score.score == pytest.approx(expected.score, rel=1e-5)
    assert not caplog.records


def test_weights_whose_run_is_unknown_are_said_to_have_none(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As training checkpoints of before they held it."""
    convert_hf_to_megatron(models / "qwen2", tmp_path / "m", **QUIET)
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "h", **QUIET)
    assert "real_megatron.yaml" not in caplog.text  # a base model has no run
    shutil.rmtree(tmp_path / "m" / "hf")
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "other", hf_path=models / "qwen2", **QUIET)
    assert "m has no real_megatron.yaml, which says how a judge is asked" in caplog.text


def test_missing_config(models: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json there"):
        convert_hf_to_megatron(tmp_path, tmp_path / "m", **QUIET)


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral"])
def test_fused_experts_are_refused_and_saving_again_helps(variant: str, tmp_path: Path) -> None:
    """transformers 5 writes them where it is told not to undo its conversion of names, and reads them."""
    model = tiny_model(variant, num_hidden_layers=1, mlp_only_layers=[])
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    message = rf"^{tmp_path}/fused: tensor 'model\.layers\.0\.mlp\.experts\.down_proj' and 1 others .*save_pretrained"
    with pytest.raises(CheckpointError, match=message):
        convert_hf_to_megatron(tmp_path / "fused", tmp_path / "megatron", workers=1, progress=False)
    with pytest.raises(CheckpointError, match=message):
        check_servers_read_the_same(tmp_path / "fused")
    loaded = load_model(tmp_path / "fused", torch.float32)
    again = AutoModelForCausalLM.from_config(loaded.config)
    again.load_state_dict(loaded.state_dict())
    again.save_pretrained(tmp_path / "again")
    convert_hf_to_megatron(tmp_path / "again", tmp_path / "megatron", workers=1, progress=False)
    check_servers_read_the_same(tmp_path / "again")
    model.save_pretrained(tmp_path / "plain")
    first, second = HFCheckpoint(tmp_path / "plain"), HFCheckpoint(tmp_path / "again")
    assert first.entries.keys() == second.entries.keys()
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.entries)


def test_existing_output(models: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "file").touch()
    with pytest.raises(FileExistsError, match="choose another output"):
        convert_hf_to_megatron(models / "mistral", tmp_path / "m", **QUIET)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["file"]


def test_a_hub_name_is_a_source(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached in tests: a download is replaced by a directory."""
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(models / "mistral")

    monkeypatch.setattr("real_megatron.hf.directory.snapshot_download", snapshot_download)
    convert_hf_to_megatron("owner/name", tmp_path / "m", revision="v1", **QUIET)
    shutil.rmtree(tmp_path / "m" / "hf")
    convert_megatron_to_hf(tmp_path / "m", tmp_path / "h", hf_path="owner/name", revision="v2", **QUIET)
    assert equal(models / "mistral", tmp_path / "h")
    assert asked == [("owner/name", "v1", True), ("owner/name", "v2", False)]


@pytest.fixture
def megatron(models: Path, tmp_path: Path) -> Path:
    convert_hf_to_megatron(models / "qwen2", tmp_path / "m", tensor=2, **QUIET)
    return tmp_path / "m"


def refused(megatron: Path, message: str) -> None:
    output = megatron.parent / "h"
    with pytest.raises(CheckpointError, match=message):
        convert_megatron_to_hf(megatron, output, **QUIET)
    assert [p.name for p in megatron.parent.iterdir()] == ["m"]


def test_incomplete_megatron_checkpoint(megatron: Path) -> None:
    (megatron / "metadata.json").unlink()
    refused(megatron, "metadata.json is missing")


def test_megatron_checkpoint_without_side_files(megatron: Path) -> None:
    shutil.rmtree(megatron / "hf")
    refused(megatron, "no subfolder 'hf' with config.json and tokenizer; name the original")


def test_other_megatron_format(megatron: Path) -> None:
    (megatron / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(megatron, "format 'zarr' is not supported")


def test_missing_megatron_file(megatron: Path) -> None:
    (megatron / "__1_0_0.distcp").unlink()
    refused(megatron, "__1_0_0.distcp is missing; it holds '")


def test_truncated_megatron_file(megatron: Path) -> None:
    file = megatron / "__1_0_0.distcp"
    file.write_bytes(file.read_bytes()[:-500])
    refused(megatron, "__1_0_0.distcp is too short: '")


def test_damaged_megatron_file(megatron: Path) -> None:
    file = megatron / "__0_0_0.distcp"
    # Everything but the length.
    file.write_bytes(bytes(file.stat().st_size))
    refused(megatron, "__0_0_0.distcp: tensor 'embedding.word_embeddings.weight' cannot be read")


def test_a_fault_in_a_worker_process(megatron: Path) -> None:
    file = megatron / "__1_0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_megatron_to_hf(megatron, megatron.parent / "h", max_file_bytes=200_000, workers=2, progress=False)
    assert [p.name for p in megatron.parent.iterdir()] == ["m"]


def test_config_of_another_model(models: Path, megatron: Path) -> None:
    config = json.loads((megatron / "hf" / "config.json").read_text())
    (megatron / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    refused(megatron, r"linear_fc1.weight' has shape \(4, 192, 64\), but config.json asks for \(4, 200, 64\)")
    (megatron / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5, "layer_types": None}))
    refused(megatron, r"has shape \(4, 64\), but config.json asks for \(5, 64\)")
    (megatron / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused(megatron, "'output_layer.weight' is missing")
    (megatron / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    refused(megatron, "fewer than the 1000 tokens")
    (megatron / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refused(megatron, "linear_qkv.bias' is not part of this model")


def _convert_slowly(source: Path, output: Path) -> None:
    # Writing thousands of small files takes long enough to be killed in between.
    convert_module.MEGATRON_FILE_BYTES = 1
    convert_hf_to_megatron(source, output, **QUIET)


def test_a_killed_conversion_leaves_nothing_that_looks_complete(models: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "m", tmp_path / ".m.partial"
    process = mp.get_context("spawn").Process(target=_convert_slowly, args=(models / "qwen3_moe", output))
    process.start()
    while not list(partial.glob("*.distcp")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial.exists() and not (partial / "metadata.json").exists() and not output.exists()
    convert_hf_to_megatron(models / "qwen3_moe", output, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_config_names_the_dtype_of_most_parameters() -> None:
    """As of checkpoints that keep some in float32, wherever they stand."""
    half, single = torch.bfloat16, torch.float32
    for dtypes in ([half, half, single], [single, half, half], [half, single, half]):
        assert convert_module._one_dtype(dtypes) is half


def test_the_vocabulary_is_padded_as_asked(models: Path, tmp_path: Path) -> None:
    """To a multiple of so many rows on each of two ranks."""
    rows = read_config(models / "qwen3").vocab_size
    convert_hf_to_megatron(models / "qwen3", tmp_path / "m", tensor=2, vocab_multiple=24, **QUIET)
    stored = TorchDistCheckpoint(tmp_path / "m").tensors["embedding.word_embeddings.weight"].size[0]
    assert stored == -(-rows // 48) * 48
