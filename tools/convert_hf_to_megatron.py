"""Convert a Hugging Face checkpoint to a Megatron distributed checkpoint. The same as `real-megatron convert`.

Needs the package on the path: `pip install -e .`, or run from the repository root with `python -m tools.…`.
"""

import argparse
import sys
from pathlib import Path

import torch

from real_megatron.bridge import convert_hf_to_megatron


def main() -> None:
    parser = argparse.ArgumentParser(description="Hugging Face checkpoint → Megatron torch_dist checkpoint.")
    parser.add_argument("--hf-path", type=Path, required=True, help="directory with config.json and safetensors")
    parser.add_argument("--output", type=Path, help="directory to create")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size to cut blocks for (default 1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size to cut files for (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel size to cut files for (default 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")
    parser.add_argument("--vocab-multiple", type=int, default=64, help="vocabulary padding, times tp (default 64)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU core, at most 8)")
    parser.add_argument("--verify", action="store_true", help="then compare logits of both sides on random tokens")
    parser.add_argument("--dry-run", action="store_true", help="print the mapping and sizes; needs only config.json")
    args = parser.parse_args()
    layout = dict(tp=args.tp, pp=args.pp, ep=args.ep, vocab_multiple=args.vocab_multiple)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.dry_run:
            from real_megatron.bridge.mapping import print_mapping

            print_mapping(args.hf_path, dtype=dtype, **layout)
            return
        if args.output is None:
            parser.error("--output is required")
        done = convert_hf_to_megatron(args.hf_path, args.output, dtype=dtype, workers=args.workers, **layout)
        print(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")
        if args.verify:
            from real_megatron.policy.verify import verify

            result = verify(args.hf_path, args.output)
            print(result)
            sys.exit(0 if result.passed else 1)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
