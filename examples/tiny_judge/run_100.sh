#!/usr/bin/env bash
# The tiny judge on a scale of 0 to 100, whose scores are one to three tokens: task and model → SFT (RAFT) → REAL → report.
# On a machine with nothing but Python 3.11. Run it again after an interruption.
#   bash examples/tiny_judge/run_100.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=runs/tiny_judge_100
source examples/tiny_judge/common.sh
bash tools/setup_env.sh requirements/cpu.txt

make_task --highest 100
make_sft examples/tiny_judge/sft_100.yaml
if [ ! -d "$out/real/hf" ]; then
    real_megatron train examples/tiny_judge/real_100.yaml
fi
real_megatron report "$out/sft" "$out/real" --output "$out" \
    --title "The tiny judge on a scale of 0 to 100: SFT, then REAL"
echo "Report: $out/report.md"
