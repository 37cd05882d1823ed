"""Bad models: config.json, tokenizers, weights; bad Megatron checkpoints and outputs of other runs."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.bad_inputs import CONVERT, JUDGE, TRAIN, Bad, refuses, set_json, set_weights, table

CONFIG, WEIGHTS = "model/config.json", Path("model/model.safetensors")
INDEX = Path("model/model.safetensors.index.json")
DAMAGED = r"model/model\.safetensors is damaged or not a safetensors file: .*; copy it again"


def config(name: str, message: str, command: str = TRAIN, **fields: Any) -> Bad:
    """A row whose config.json has other fields."""
    return Bad(name, message, command, make=set_json(CONFIG, **fields))


def weights(name: str, message: str, change: Callable[[dict[str, Any]], Any], command: str = CONVERT) -> Bad:
    """A row whose weights are others."""
    return Bad(name, message, command, make=set_weights(change))


def cut() -> None:
    WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-100])


def lie(**fields: Any) -> Callable[[], None]:
    """The header says something else of a tensor than what is there."""

    def change() -> None:
        data = WEIGHTS.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header["model.norm.weight"] |= fields
        text = json.dumps(header).encode()
        WEIGHTS.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return change


def split(then: Callable[[], Any]) -> Callable[[], None]:
    """The weights as two files with an index, and what happens to those."""

    def change() -> None:
        tensors, places = load_file(WEIGHTS), {}
        WEIGHTS.unlink()
        for number, names in enumerate((sorted(tensors)[:3], sorted(tensors)[3:]), 1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, f"model/{file}", {"format": "pt"})
            places |= dict.fromkeys(names, file)
        INDEX.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        then()

    return change


def pickled() -> None:
    torch.save(load_file(WEIGHTS), "model/pytorch_model.bin")
    WEIGHTS.unlink()


CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
RUN_FILE = "out/hf/real_megatron.yaml"
TO_HF = "convert to-hf megatron out"
META = "megatron/metadata.json"


@table(
    Bad("no directory", r"model\.path: nowhere: no such directory; name", TRAIN + " model.path=nowhere"),
    Bad("a file in place of the directory", r"model\.path: train\.jsonl: no such directory; name", TRAIN + " model.path=train.jsonl"),
    Bad("no config.json", r"model\.path: model: no config\.json there; name", make=lambda: os.remove(CONFIG)),
    Bad("no config.json to judge with", r"model: no config\.json there; name", JUDGE, make=lambda: os.remove(CONFIG)),
    Bad("config.json cut short", r"model/config\.json: not valid JSON .*; copy it again", files={CONFIG: '{"model_type": "qwen3"'}),
    Bad("config.json in Latin-1", r"model/config\.json: not valid JSON .*; copy it again", files={CONFIG: b'{"a": "\xe9"}'}),
    Bad("config.json is a list", r"model/config\.json: no JSON object; copy it again", CONVERT, {CONFIG: "[]"}),
    config("no type of model", r"model/config\.json cannot be used: .*`model_type` key", model_type=None),
    config("an unknown type", r"model/config\.json: model_type 'own' is unknown to transformers [\d.]+; take a model", model_type="own"),
    config("code of its own", r"model/config\.json: model_type 'own' is unknown to .* its own code \(auto_map\) is never run; take", JUDGE, model_type="own", auto_map=CODE),
    config("a type without a family", r"model/config\.json: model_type 'gpt2' is not supported\. Supported: llama, .*docs/extending\.md", model_type="gpt2"),
    config("another activation", r"model/config\.json: model_type 'qwen3' with hidden_act='gelu' is not supported: only 'silu'", hidden_act="gelu"),
    config("layers of another type", r"model/config\.json: .*layer_types 'linear_attention' is not supported: only full_attention", CONVERT, layer_types=["linear_attention"]),
    config("quantised", r"model/config\.json: .*quantization_config is not supported: convert", quantization_config={"quant_method": "gptq", "bits": 4}),
    config("quantised to judge with", r"model/config\.json: quantization_config: .*convert the checkpoint", JUDGE, quantization_config={"quant_method": "fp8"}),
    config("a quantisation that is none", r"model/config\.json cannot be used: .*to_dict", quantization_config="x"),
    config("an unknown rope type", r"model/config\.json: rope_parameters .*rope_type 'own' is not supported; supported are", rope_parameters={"rope_type": "own", "rope_theta": 1e4}),
    config("no heads", r"model/config\.json: num_attention_heads is 0, where .*copy it again", JUDGE, num_attention_heads=0),
    config("heads of no width", r"model/config\.json: head_dim is 0, where", CONVERT, head_dim=0),
    config("a negative width", r"model/config\.json: hidden_size is -64, where", JUDGE, hidden_size=-64),
    config("a text for a number", r"model/config\.json cannot be used: .*num_attention_heads.*expected int", num_attention_heads="4"),
    config("another number of layers", r"model/config\.json cannot be used: .*`num_hidden_layers` \(2\)", num_hidden_layers=2),
    config("a dtype that is none", r"model/config\.json cannot be used: .*'own'", dtype="own"),
    config("an activation that is none", r"model: transformers cannot load the model: KeyError: 'own'; compare config\.json", JUDGE, hidden_act="own"),
    config("an end of sequence that is a text", r"model/config\.json cannot be used: .*eos_token_id", eos_token_id="x"),
    Bad("damaged generation settings", r"model/generation_config\.json is damaged: ", JUDGE, {"model/generation_config.json": "{"}),
)  # fmt: skip
def test_a_bad_configuration_of_a_model_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


def template(text: str) -> Callable[[], None]:
    return set_json("model/tokenizer_config.json", chat_template=text)


def beyond() -> None:
    tree = json.loads(Path("model/tokenizer.json").read_text())
    tree["model"]["vocab"]["extra"] = 300
    Path("model/tokenizer.json").write_text(json.dumps(tree))


TOKENIZER = r"model: its tokenizer cannot be loaded: .*; copy its files again"


@table(
    Bad("no tokenizer", r"model has no tokenizer: none of tokenizer\.json, .*copy", make=lambda: os.remove("model/tokenizer.json")),
    Bad("a tokenizer cut short", TOKENIZER, files={"model/tokenizer.json": "{"}),
    Bad("an empty tokenizer", TOKENIZER, JUDGE, {"model/tokenizer.json": ""}),
    Bad("a tokenizer of other keys", TOKENIZER, files={"model/tokenizer.json": "{}"}),
    Bad("a tokenizer that is no text", TOKENIZER, files={"model/tokenizer.json": b"\xff\xfe"}),
    Bad("a slow tokenizer that is none", TOKENIZER, files={"model/tokenizer.model": b"\x00\x01"}, make=lambda: os.remove("model/tokenizer.json")),
    Bad("damaged settings of the tokenizer", TOKENIZER, files={"model/tokenizer_config.json": "{"}),
    Bad("a token beyond the embedding", r"model: the tokenizer's token 'extra' has the id 300, but .*vocab_size in config\.json is 258: take", make=beyond),
    config("a vocabulary smaller than the scale", r"model: the tokenizer's token .*vocab_size in config\.json is 50: take", JUDGE, vocab_size=50),
    Bad("an end of sequence that is no token", r"model: the tokenizer's token '<nope>' has the id 258, but", make=set_json("model/tokenizer_config.json", eos_token="<nope>")),
    Bad("a chat template that is open", r"example row 0: the tokenizer's chat template refuses .*unexpected end of template", make=template("{{ open")),
    Bad("a chat template that writes nothing", r"example row 0: the prompt is empty", make=template("{{ '' }}")),
    Bad("a chat template that refuses all", r"train\.jsonl: no row could be judged, see out\.jsonl\.errors", JUDGE, make=template("{{ raise_exception('no') }}")),
)  # fmt: skip
def test_a_bad_tokenizer_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


@table(
    Bad("weights cut short", DAMAGED, TRAIN, make=cut),
    Bad("weights cut short to judge with", DAMAGED, JUDGE, make=cut),
    Bad("empty weights", DAMAGED, CONVERT, {str(WEIGHTS): ""}),
    Bad("weights that are a pointer of Git LFS", r"model/model\.safetensors is damaged .*Git LFS pointer: git lfs pull", CONVERT, {str(WEIGHTS): "version https://git-lfs.github.com/spec/v1\n"}),
    Bad("a header beyond the file", DAMAGED, CONVERT, make=lambda: WEIGHTS.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
    Bad("a header that is no JSON", DAMAGED, CONVERT, make=lambda: WEIGHTS.write_bytes(struct.pack("<Q", 4) + b"abcd")),
    Bad("a header with another shape", DAMAGED, JUDGE, make=lie(shape=[65])),
    Bad("a header with other places", DAMAGED, CONVERT, make=lie(data_offsets=[0, 10**12])),
    Bad("a header with a dtype that is none", DAMAGED, CONVERT, make=lie(dtype="X9")),
    weights("a missing tensor", r"model: tensor 'model\.norm\.weight' is missing", lambda t: t.pop("model.norm.weight")),
    weights("a missing tensor to judge with", r"model: tensor 'model\.norm\.weight' is missing", lambda t: t.pop("model.norm.weight"), JUDGE),
    weights("a tensor too many", r"model/model\.safetensors: tensor 'x' is not part of this model", lambda t: t.update(x=torch.ones(3))),
    weights("another shape", r"model/model\.safetensors: tensor 'model\.norm\.weight' has shape \(65,\), .*config\.json asks for \(64,\)", lambda t: t.update({"model.norm.weight": torch.ones(65)})),
    weights("another shape to judge with", r"model: tensor 'model\.norm\.weight' has another shape", lambda t: t.update({"model.norm.weight": torch.ones(65)}), JUDGE),
    weights("whole numbers", r"model/model\.safetensors: tensor 'model\.norm\.weight' has dtype I8; supported: .*must be converted", lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), JUDGE),
    weights("NaN", r"the rollout engine returned log-probabilities that are not finite for prompt 0: its weights are damaged", lambda t: t["model.norm.weight"].fill_(float("nan")), JUDGE),
    Bad("pickled weights", r"model holds pickled \.bin weights only; save", JUDGE, make=pickled),
    Bad("no weights", r"model: neither model\.safetensors nor model\.safetensors\.index\.json found", JUDGE, make=WEIGHTS.unlink),
    Bad("a missing file of several", r"model/model-00002-of-00002\.safetensors is missing; model\.safetensors\.index\.json places tensor", JUDGE, make=split(lambda: os.remove("model/model-00002-of-00002.safetensors")), mended=False),
    Bad("a lost index", r"model: neither .*found \(but model-00001-of-00002\.safetensors", CONVERT, make=split(INDEX.unlink)),
    Bad("an empty index", r"model/model\.safetensors\.index\.json is damaged: it lists no tensors; copy", JUDGE, make=split(lambda: INDEX.write_text('{"weight_map": {}}')), mended=False),
    Bad("an index that is a list", r"model/model\.safetensors\.index\.json is damaged: .*; copy", CONVERT, make=split(lambda: INDEX.write_text("[]"))),
    Bad("an adapter beside the weights", r"model/adapter_config\.json: an adapter beside .*Merge it", CONVERT, {"model/adapter_config.json": "{}"}),
)  # fmt: skip
def test_bad_weights_are_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


@table(
    Bad("no Megatron checkpoint", r"model/metadata\.json is missing: not a complete Megatron checkpoint", "convert to-hf model out"),
    Bad("another format", r"megatron/metadata\.json: format 'zarr' is not supported; save", TO_HF, {META: '{"sharded_backend": "zarr"}'}),
    Bad("damaged metadata", r"megatron/metadata\.json is damaged: ", TO_HF, {META: "{"}),
    Bad("half a directory", r"megatron/\.metadata is missing: not a complete", TO_HF, {META: '{"sharded_backend": "torch_dist"}'}),
    Bad("a pickle that would run a command", r"megatron/\.metadata is damaged .*'os\.system' has no place", TO_HF,
        {META: '{"sharded_backend": "torch_dist"}', "megatron/.metadata": b"cos\nsystem\n(S'touch run'\ntR."}),
    Bad("half a checkpoint to resume", r"out/checkpoints/step-000001.*common\.pt is missing: the checkpoint is damaged", TRAIN, {"out/checkpoints/step-000001/x": "y"}),
    Bad("metadata of other keys to resume", r".*out/checkpoints/step-000001.*", TRAIN,
        {f"out/checkpoints/step-000001/{name}": "{}" for name in ("common.pt", "metadata.json", ".metadata")}),
    Bad("an export that no run has made", r"out/hf exists, and no run has made it: choose another output, or remove it", TRAIN, {"out/hf/x": "y"}),
    Bad("an export of something else", r"out/hf/real_megatron\.yaml is not that of a run: choose another output", TRAIN, {RUN_FILE: "seed: 3"}),
    Bad("a damaged description of an export", r"out/hf/real_megatron\.yaml:1: not valid YAML: ", TRAIN, {RUN_FILE: "{"}),
    Bad("a damaged description of the judge", r"model/real_megatron\.yaml:1: not valid YAML: ", JUDGE, {"model/real_megatron.yaml": "{"}),
    Bad("a scale of one score with the judge", r"model/real_megatron\.yaml: scale: scores must be two or more", JUDGE, {"model/real_megatron.yaml": "scale: {scores: [1]}"}),
    Bad("another's file as template of the judge", r"model/real_megatron\.yaml: data\.template: '/etc/passwd' was a file where .*name your copy", JUDGE, {"model/real_megatron.yaml": "data: {template: /etc/passwd}"}),
    Bad("an output of conversion that exists", r"train\.jsonl exists already; choose another", CONVERT.replace("out", "train.jsonl")),
    Bad("a model in place of a file", r"model\.path: model: no such directory", TRAIN, make=lambda: (shutil.rmtree("model"), Path("model").touch())),
)  # fmt: skip
def test_a_bad_checkpoint_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)
