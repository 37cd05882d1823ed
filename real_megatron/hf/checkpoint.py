"""Reading a Hugging Face checkpoint directory: no tensor missing or unknown, and only the needed blocks are read.

Format: `model.safetensors`, or several files listed in `model.safetensors.index.json` (https://huggingface.co/docs/safetensors).
A directory may hold further sets of weights: `weight_files` says which one is the checkpoint, for every reader.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from real_megatron.errors import CheckpointError

Shape = tuple[int, ...]
Range = tuple[int, int]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# All experts of a layer in one tensor, as transformers 5 holds them in memory. transformers reads such files too.
_FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
ROTARY = "rotary_emb.inv_freq"
"""End of the names of rotary frequencies, which old checkpoints hold though they are no weights."""
# Files are memory-mapped; what has been read counts as resident until the mapping is closed.
REMAP_BYTES = 32 * 2**20


class Entry(NamedTuple):
    """Where a tensor is stored, and how."""

    file: Path
    shape: Shape
    dtype: torch.dtype


class HFCheckpoint:
    """The tensors of a Hugging Face checkpoint directory.

    Reads every file's header; raises CheckpointError if a file is missing or damaged, or if the index does not agree
    with the files. Can be pickled: worker processes open the files again.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, Any] = {}
        self._read_bytes = 0
        files, listed = _choose(self.directory)
        for file in files:
            for name, entry in _read_header(file):
                if name in self.entries:
                    raise CheckpointError(f"{file}: tensor '{name}' is also in {self.entries[name].file.name}")
                if listed is not None and listed.get(name) != file.name:
                    raise CheckpointError(f"{file}: tensor '{name}' is not listed for this file in {INDEX}")
                self.entries[name] = entry
        for name, listed_file in (listed or {}).items():
            if name not in self.entries:
                raise CheckpointError(
                    f"{self.directory / listed_file}: tensor '{name}' is missing, though {INDEX} lists it"
                )

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def validate(self, expected: Mapping[str, Shape], tied: bool) -> None:
        """Check that exactly the tensors `expected` (name → shape) are there; else raise CheckpointError.

        Rotary frequencies, which old checkpoints hold, are ignored. So is the output layer of a model with tied
        embeddings, if it equals them.
        """
        _refuse_fused(self.directory, self.entries.keys() - expected.keys())
        for name, shape in expected.items():
            if name not in self.entries:
                raise CheckpointError(f"{self.directory}: tensor '{name}' is missing")
            entry = self.entries[name]
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' has shape {entry.shape}, but config.json asks for {shape}"
                )
        for name, entry in self.entries.items():
            if name in expected or name.endswith(ROTARY):
                continue
            if tied and name == "lm_head.weight":
                self._require_equal(name, "model.embed_tokens.weight")
            else:
                raise CheckpointError(f"{entry.file}: tensor '{name}' is not part of this model")

    def _require_equal(self, name: str, other: str, rows: int = 8192) -> None:
        entry = self.entries[name]
        same = entry.shape == self.entries[other].shape and all(
            torch.equal(self.block(name, (row, row + rows)), self.block(other, (row, row + rows)))
            for row in range(0, entry.shape[0], rows)
        )
        if not same:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' differs from '{other}', but config.json ties them; "
                "set tie_word_embeddings to false there if the output layer is its own"
            )

    def block(self, name: str, rows: Range, columns: Range | None = None) -> torch.Tensor:
        """Rows and columns (default: all) of a tensor, on the CPU, in the stored dtype."""
        stored = self._open(self.entries[name].file).get_slice(name)
        tensor = stored[slice(*rows)] if columns is None else stored[slice(*rows), slice(*columns)]
        self._read_bytes += tensor.nbytes
        return tensor

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self.block(name, (0, self.entries[name].shape[0]))

    def _open(self, file: Path) -> Any:
        if self._read_bytes > REMAP_BYTES:
            self._handles.clear()
            self._read_bytes = 0
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_read_bytes": 0}


def has_weights(directory: Path) -> bool:
    """Whether a directory holds the weights of a checkpoint, whole or not."""
    return any((directory / name).is_file() for name in (INDEX, SINGLE))


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the checkpoint's weights: `model.safetensors`, or those that the index lists.

    Other files beside them are no part of it: transformers reads none of `consolidated.safetensors` (Mistral's own
    format), `adapter_model.safetensors` and pickled `.bin` files. Raises CheckpointError where no such files are, one
    of them is missing, or readers would differ in what they read:

    - `model.safetensors` beside an index of other files: transformers reads the former, SGLang and vLLM the latter;
    - `adapter_config.json`: transformers with peft installed adds the adapter to the weights, no other reader does;
    - `transformers_weights` in config.json: transformers reads the file that it names, no other reader does.
    """
    return _choose(directory)[0]


def check_servers_read_the_same(directory: Path) -> None:
    """Raise CheckpointError as `weight_files`, where SGLang and vLLM would load more than those (without an index they
    read every safetensors file there is), and for experts under names that servers do not know. A directory without
    weights passes."""
    if not has_weights(directory):
        return
    _, listed = _choose(directory)
    if listed is not None:
        _refuse_fused(directory, listed)
        return
    _refuse_fused(directory, _read_names(directory / SINGLE))
    others = sorted(file.name for file in directory.glob("*.safetensors") if file.name != SINGLE)
    if others:
        raise CheckpointError(
            f"{directory} holds {', '.join(others)} beside {SINGLE}, and no {INDEX}: SGLang and vLLM servers would "
            f"load all of them. Move {', '.join(others)} to another directory"
        )


def _choose(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index (tensor → file) if they have one."""
    single, index = directory / SINGLE, directory / INDEX
    _refuse_redirected(directory)
    listed = _read_index(index) if index.exists() else None
    if listed is None:
        if single.is_file():
            return [single], None
        raise CheckpointError(_none_found(directory))
    names = sorted(set(listed.values()))
    if single.is_file() and names != [SINGLE]:
        raise CheckpointError(
            f"{directory} holds two sets of weights: {SINGLE}, which transformers reads, and {INDEX} with {names[0]} "
            "and others, which SGLang and vLLM read. Remove the set that is not meant"
        )
    for name in names:
        if not (directory / name).is_file():
            lost = next(tensor for tensor, where in listed.items() if where == name)
            raise CheckpointError(f"{directory / name} is missing; {INDEX} places tensor '{lost}' and others there")
    return [directory / name for name in names], listed


def _refuse_redirected(directory: Path) -> None:
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise CheckpointError(
            f"{adapter}: an adapter beside the weights of a model, which transformers adds to them where peft is "
            "installed. Merge it into the weights (peft's merge_and_unload), or move adapter_config.json and "
            "adapter_model.safetensors to another directory"
        )
    config = directory / "config.json"
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return  # read_config names what is wrong with it
    if named:
        raise CheckpointError(
            f"{config}: transformers_weights names '{named}', which servers do not read. Remove the key and give that "
            f"file its usual name: {SINGLE}, or {INDEX}"
        )


def _refuse_fused(directory: Path, names: Iterable[str]) -> None:
    fused = sorted(name for name in names if _FUSED.search(name))
    if fused:
        raise CheckpointError(
            f"{directory}: tensor '{fused[0]}' and {len(fused) - 1} others hold all experts of a layer in one, as "
            "transformers 5 does in memory, where a checkpoint has a tensor for each expert. Save the model with "
            "save_pretrained's default, save_original_format=True. A model that was loaded from such files keeps their "
            "names even so: copy its state_dict() into AutoModelForCausalLM.from_config of its config, and save that"
        )


def _none_found(directory: Path) -> str:
    others = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern))
    if others and all(name.endswith(".bin") for name in others):
        return f"{directory} holds pickled .bin weights only; save the model as safetensors"
    found = f" (but {', '.join(others[:3])}, which transformers does not read)" if others else ""
    return f"{directory}: neither {SINGLE} nor {INDEX} found{found}"


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name, file in weight_map.items() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}; copy it again from where the model is from") from error
    if not weight_map:
        raise CheckpointError(f"{index} is damaged: it lists no tensors; copy it again from where the model is from")
    for name in outside:
        raise CheckpointError(f"{index}: tensor '{name}' points outside the directory: {weight_map[name]}")
    return weight_map


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        pointer = file.is_file() and file.open("rb").read(20).startswith(b"version https://git")
        fix = "it is a Git LFS pointer: git lfs pull" if pointer else "copy it again from where the model is from"
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}; {fix}") from error


def _read_names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def _read_header(file: Path) -> Iterable[tuple[str, Entry]]:
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            stored = handle.get_slice(name)
            dtype = stored.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor '{name}' has dtype {dtype}; supported: {', '.join(DTYPES)}. "
                    "Quantised weights must be converted first"
                )
            yield name, Entry(file, tuple(stored.get_shape()), DTYPES[dtype])
