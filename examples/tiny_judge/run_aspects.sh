#!/usr/bin/env bash
# The tiny judge with two aspects, so two scores of each critique: task and model → SFT (RAFT) → REAL → report.
# On a machine with nothing but Python 3.11. Run it again after an interruption.
#   bash examples/tiny_judge/run_aspects.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=runs/tiny_judge_aspects
source examples/tiny_judge/common.sh
bash tools/setup_env.sh requirements/cpu.txt

make_task --aspects
make_sft examples/tiny_judge/sft_aspects.yaml
if [ ! -d "$out/real/hf" ]; then
    real_megatron train examples/tiny_judge/real_aspects.yaml
fi
real_megatron report "$out/sft" "$out/real" --output "$out" \
    --title "The tiny judge with two aspects: SFT, then REAL"
echo "Report: $out/report.md"
