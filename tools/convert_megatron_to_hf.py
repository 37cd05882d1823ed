"""Convert a Megatron distributed checkpoint to a Hugging Face checkpoint: `real-megatron convert to-hf`.

    python tools/convert_megatron_to_hf.py SOURCE OUTPUT [--hf DIR_OR_NAME] [--dtype D] [--max-file-gb G] [--verify]

Needs the package installed (`pip install -e .`). `--help` lists all options.
"""

import sys

from real_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "to-hf"]
    main()
