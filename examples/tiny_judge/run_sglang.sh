#!/usr/bin/env bash
# REAL on the tiny judge with rollouts from a real SGLang server instead of the embedded engine: 20 steps.
# Installs SGLang's CPU build into .venv-sglang (2.6 GB); with a GPU, name the Python of your own SGLang instead:
#   bash examples/tiny_judge/run_sglang.sh [PYTHON]
# Needs what examples/tiny_judge/run.sh has made: data and the SFT checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ ! -d runs/tiny_judge/sft/hf ]; then
    echo "runs/tiny_judge/sft/hf is not there: run bash examples/tiny_judge/run.sh first" >&2
    exit 1
fi
if [ -n "${1:-}" ]; then
    python=$1
else
    bash tools/install_sglang_cpu.sh
    python=.venv-sglang/bin/python
fi
bash tools/setup_env.sh requirements.txt
.venv/bin/python -m real_megatron train examples/tiny_judge/real.yaml \
    output=runs/tiny_judge/real_sglang steps=20 evaluation.every=10 \
    rollout.engine=sglang rollout.python="$python" rollout.max_new_tokens=16
.venv/bin/python -m real_megatron report runs/tiny_judge/sft runs/tiny_judge/real_sglang \
    --output runs/tiny_judge/real_sglang
