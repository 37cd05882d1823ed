"""A GGUF file of a Llama-like model as a Hugging Face checkpoint in bfloat16.

    python tools/gpu/gguf_to_hf.py FILE.gguf OUTPUT
    python tools/gpu/gguf_to_hf.py PIECE OUTPUT          # FILE.gguf.aa … as `split` writes them: name the first

Needs the packages gguf and accelerate. The weights are those that the file's quantisation stands for.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def pieces(path: Path) -> list[Path]:
    """The file itself, or all pieces of `split` where `path` is the first of them."""
    if path.suffix == ".gguf":
        return [path]
    return sorted(p for p in path.parent.glob(f"{path.stem}.*") if len(p.suffix) == len(path.suffix))


def convert(path: Path, output: Path) -> None:
    """Write the checkpoint and its tokenizer to `output`."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.gguf"
        with whole.open("wb") as target:
            for piece in pieces(path):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, target)
        read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=whole.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
    # A model that was read from GGUF calls itself quantised and refuses to be saved: its twin does not.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    convert(options.file, options.output)


if __name__ == "__main__":
    main()
