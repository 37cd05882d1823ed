#!/usr/bin/env bash
# REAL on the tiny judge with rollouts from a real SGLang server instead of the embedded engine: 20 steps, weights sent
# to the server over a process group before each. On a machine with nothing but Python 3.11: installs SGLang's CPU build
# into .venv-sglang (2.6 GB), makes the task and the SFT checkpoint where examples/tiny_judge/run.sh has not yet.
# With a GPU, name the Python of your own SGLang instead of having the CPU build installed:
#   bash examples/tiny_judge/run_sglang.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/tiny_judge/common.sh
python=${1:-.venv-sglang/bin/python}
if [ -z "${1:-}" ]; then
    bash tools/install_sglang_cpu.sh
fi
bash tools/setup_env.sh requirements/cpu.txt

make_task
make_sft
real_megatron train examples/tiny_judge/real.yaml \
    output="$out/real_sglang" steps=20 evaluation.every=10 rollout.engine=sglang rollout.python="$python"
real_megatron report "$out/sft" "$out/real_sglang" --output "$out/real_sglang" \
    --title "The tiny judge: SFT, then REAL with rollouts from SGLang"
