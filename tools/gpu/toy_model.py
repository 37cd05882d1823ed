"""What part 4 of tools/gpu_acceptance.sh runs on in a dry run: a tiny random model and a few rows.

python tools/gpu/toy_model.py DIR
"""

import json
import sys
from pathlib import Path

from real_megatron.data.byte_model import make_byte_model


def main() -> None:
    folder = Path(sys.argv[1])
    make_byte_model(folder)
    for name in ("train", "valid", "test_ood"):
        rows = [
            {"id": f"{name}-{i}", "prompt": f"Rate {i} of 5.", "label": float(i % 5 + 1), "cot": "So many."}
            for i in range(8)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
