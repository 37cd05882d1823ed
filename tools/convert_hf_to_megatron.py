"""Convert a Hugging Face checkpoint to a Megatron distributed checkpoint: `real-megatron convert to-megatron`.

    python tools/convert_hf_to_megatron.py SOURCE OUTPUT [--tensor N] [--pipeline N] [--expert N] [--dtype D] [--verify]

Needs the package installed (`pip install -e .`). `--help` lists all options.
"""

import sys

from real_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "to-megatron"]
    main()
