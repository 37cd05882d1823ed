#!/usr/bin/env bash
# The tiny judge, end to end, on a machine with nothing but Python 3.11 (nine minutes on two cores):
# environment → data and model → SFT (RAFT) → REAL → evaluation on both test sets → report → the checkpoint loads.
# Beside them, on the second core, `direct`, a baseline: the same model and prompts, trained to give the score without a
# critique, with more updates than SFT and REAL have together.
# Run it again after an interruption: what is finished is skipped, training goes on from its last checkpoint.
#   bash examples/tiny_judge/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/tiny_judge/common.sh
bash tools/setup_env.sh requirements/cpu.txt

make_task
direct=
if [ ! -d "$out/direct/hf" ]; then
    echo "The direct baseline trains beside SFT and REAL: $out/direct.log"
    .venv/bin/python -m real_megatron sft examples/tiny_judge/sft.yaml sft.cots=none steps=400 \
        data.train.1.path="$out/task/train_rl.jsonl" output="$out/direct" >"$out/direct.log" 2>&1 &
    direct=$!
    trap 'kill "$direct" 2>/dev/null || true' EXIT
fi
make_sft
if [ ! -d "$out/real/hf" ]; then
    real_megatron train examples/tiny_judge/real.yaml
fi
if [ -n "$direct" ]; then
    if ! wait "$direct"; then
        tail -n 20 "$out/direct.log" >&2
        echo "The direct baseline failed; its log: $out/direct.log" >&2
        exit 1
    fi
    trap - EXIT
fi
# The runs have evaluated themselves at their last step; this reads the exported checkpoint, as a user would.
if [ ! -f "$out/checkpoint/evaluation/out_of_domain.json" ]; then
    real_megatron evaluate examples/tiny_judge/real.yaml --output "$out/checkpoint"
fi
real_megatron report "$out/sft" "$out/direct" "$out/real" --output "$out" \
    --title "The tiny judge: SFT, a direct judge without critiques, and REAL"
.venv/bin/python - "$out" <<'PYTHON'
import json
import sys
from itertools import islice

from transformers import AutoModelForCausalLM, AutoTokenizer

out = sys.argv[1]
model, tokenizer = (kind.from_pretrained(f"{out}/real/hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
print(f"AutoModelForCausalLM loads {out}/real/hf. Three test prompts, greedily:")
with open(f"{out}/task/test_in_domain.jsonl", encoding="utf-8") as lines:
    for row in map(json.loads, islice(lines, 3)):
        tokens = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**tokens, max_new_tokens=16, do_sample=False)
        print(f"  label {row['label']}: {tokenizer.decode(output[0])}")
PYTHON
echo "Report: $out/report.md"
