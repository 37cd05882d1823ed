"""A checkpoint by directory or hub name: what is downloaded and returned, and one clear message for each mistake."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RevisionNotFoundError
from transformers import Qwen3Config

from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.errors import CheckpointError
from real_megatron.hf import directory as directory_module
from real_megatron.hf.directory import check_vocabulary, checkpoint_directory, load_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


@pytest.fixture
def downloads(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The hub cannot be reached in tests: every download is `model`. The calls, in order."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(model)

    monkeypatch.setattr(directory_module, "snapshot_download", snapshot_download)
    return calls


def test_a_directory_is_itself(model: Path, downloads: list[dict[str, Any]]) -> None:
    assert checkpoint_directory(model) == checkpoint_directory(str(model)) == model
    assert downloads == []


def test_a_directory_wins_over_a_hub_name(
    tmp_path: Path, downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = Path("owner/name")
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    assert checkpoint_directory("owner/name") == local
    assert downloads == []


def test_a_hub_name_is_downloaded(model: Path, downloads: list[dict[str, Any]]) -> None:
    assert checkpoint_directory("owner/name", "v1.0") == model
    assert checkpoint_directory("Qwen/Qwen3-0.6B") == model
    assert [(call["name"], call["revision"]) for call in downloads] == [
        ("owner/name", "v1.0"),
        ("Qwen/Qwen3-0.6B", None),
    ]
    patterns = downloads[0]["allow_patterns"]
    for wanted in ("config.json", "tokenizer*", "*.safetensors", "*.safetensors.index.json"):
        assert wanted in patterns
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "pytorch_model.bin",
                "modeling_evil.py",
                "model.gguf",
                "consolidated.safetensors",
                "adapter_model.safetensors",
                "original/model.safetensors",
                "original/tokenizer.model",
                "original/processor_config.json",
                "original/model.safetensors.index.json",
            ],
            allow_patterns=patterns,
            ignore_patterns=downloads[0]["ignore_patterns"],
        )
    )
    assert kept == ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]


def test_without_weights_only_side_files_are_downloaded(model: Path, downloads: list[dict[str, Any]]) -> None:
    assert checkpoint_directory("owner/name", weights=False) == model
    assert "config.json" in downloads[0]["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in downloads[0]["allow_patterns"])


@pytest.mark.parametrize("name", ["gone", "/no/such/model", "a/b/c", "../model", "owner/"])
def test_a_missing_directory_that_is_no_hub_name(name: str, downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: no such directory; name the directory"):
        checkpoint_directory(name)
    assert downloads == []


def test_a_path_is_never_a_hub_name(downloads: list[dict[str, Any]]) -> None:
    """Such as `output/hf` of a run that has not finished."""
    with pytest.raises(CheckpointError, match="^runs/hf: no such directory"):
        checkpoint_directory(Path("runs/hf"))
    assert downloads == []


def test_a_directory_has_no_revision(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a directory here, without a revision 'v1': leave the revision out"):
        checkpoint_directory(model, "v1")


def test_no_configuration(model: Path, downloads: list[dict[str, Any]]) -> None:
    (model / "config.json").unlink()
    for name in (str(model), "owner/name"):
        with pytest.raises(CheckpointError, match=f"^{name}: no config.json there"):
            checkpoint_directory(name)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1 and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_directory("owner/name", "v1")
    message = str(caught.value)
    assert message.startswith(
        "owner/name: no directory here, and it cannot be downloaded from the hub at revision 'v1'"
    )
    assert "HF_HUB_OFFLINE=0" in message and message.endswith("(`hf download`) and name its directory")
    assert "\n" not in message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__, "a chain of tracebacks"


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(directory_module, "snapshot_download", snapshot_download)


def test_no_such_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(RevisionNotFoundError):
        def __init__(self) -> None:
            """Without the server's response."""

    failing(monkeypatch, Gone())
    message = "^owner/name: .*the hub has no such model at revision 'v9'.*hf auth login"
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_directory("owner/name", "v9")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("error", [ConnectionError("down\nmore"), ValueError("down\nmore"), RuntimeError("down\nmore")])
def test_any_other_fault_of_the_hub_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, error)
    with pytest.raises(CheckpointError, match=rf"^owner/name: .*\({type(error).__name__}: down\); without a network"):
        checkpoint_directory("owner/name")


def test_the_tokenizer(model: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"^{model} has no tokenizer: none of tokenizer.json, .*copy the tokenizer's files"
    ):
        load_tokenizer(model)
    Qwen3Config(vocab_size=258).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    assert load_tokenizer(model).encode("a") == [97]
    (model / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(CheckpointError, match=f"^{model}: its tokenizer cannot be loaded"):
        load_tokenizer(model)


def test_a_tokenizer_without_its_vocabulary_is_missing(model: Path) -> None:
    """transformers makes an empty tokenizer of a Qwen checkpoint without one."""
    Qwen3Config(vocab_size=258).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"^{model} has no tokenizer"):
        load_tokenizer(model)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"^{model} has no tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize(("rows", "fits"), [(300, True), (258, True), (257, False)])
def test_a_tokenizer_must_fit_the_embedding(rows: int, fits: bool, model: Path) -> None:
    Qwen3Config(vocab_size=rows).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    tokenizer = load_tokenizer(model)
    assert len(tokenizer) == 258
    check_vocabulary(model, tokenizer, [])
    check_vocabulary(model, tokenizer, [rows - 1, 0])
    if fits:
        check_vocabulary(model, tokenizer)
        return
    message = rf"^{model}: the tokenizer's token '<eos>' has the id 257, .* is 257: .*resize_token_embeddings"
    for ids in (None, [0, 257]):
        with pytest.raises(CheckpointError, match=message):
            check_vocabulary(model, tokenizer, ids)
