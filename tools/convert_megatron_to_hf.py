"""Convert a Megatron distributed checkpoint to Hugging Face format. The same as `real-megatron convert`."""

import argparse
import sys
from pathlib import Path

import torch

from real_megatron.bridge import convert_megatron_to_hf


def main() -> None:
    parser = argparse.ArgumentParser(description="Megatron torch_dist checkpoint → Hugging Face checkpoint.")
    parser.add_argument("--megatron-path", type=Path, required=True, help="directory with metadata.json and .distcp")
    parser.add_argument("--output", type=Path, help="directory to create")
    parser.add_argument("--hf-path", type=Path, help="config.json and tokenizer; default: MEGATRON_PATH/hf")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest safetensors file in GB (default 5)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU core, at most 8)")
    parser.add_argument("--verify", action="store_true", help="then compare logits of both sides on random tokens")
    parser.add_argument("--dry-run", action="store_true", help="print the mapping and sizes; needs only config.json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.dry_run:
            from real_megatron.bridge.mapping import print_mapping

            print_mapping(args.hf_path or args.megatron_path / "hf", dtype=dtype)
            return
        if args.output is None:
            parser.error("--output is required")
        done = convert_megatron_to_hf(
            args.megatron_path,
            args.output,
            hf_path=args.hf_path,
            dtype=dtype,
            max_shard_bytes=int(args.max_shard_gb * 10**9),
            workers=args.workers,
        )
        print(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")
        if args.verify:
            from real_megatron.policy.verify import verify

            result = verify(args.output, args.megatron_path)
            print(result)
            sys.exit(0 if result.passed else 1)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
