#!/usr/bin/env bash
# Installs SGLang 0.5.21 and its router for a machine without a GPU into a virtual environment of its own (its
# transformers is older than ours). Usage: bash tools/install_sglang_cpu.sh [DIR]      (default .venv-sglang; about 2.6 GB,
# one to two minutes)
# Versions are those of requirements/sglang.txt, which is the whole environment for GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

dir="${1:-.venv-sglang}"
python="${PYTHON:-python3.11}"
stamp="$dir/.sglang-cpu-0.5.21-router-0.3.2"

if [ -f "$stamp" ]; then
    echo "SGLang is installed in $dir"
    exit 0
fi

pinned() { # NAME …: their lines of the requirements
    local name
    for name; do grep "^$name==" requirements/sglang.txt || { echo "$name is not in requirements/sglang.txt" >&2; }; done
}

"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }

# Which wheel a plain `torch` is depends on the package index: the CPU build and the CUDA build both serve.
pip "$(pinned torch)"
# Without their dependencies: sglang's own list pulls CUDA kernels that a CPU machine neither needs nor can load.
mapfile -t kernels < <(pinned sglang sglang-router xgrammar apache-tvm-ffi triton torchvision)
pip --no-deps "${kernels[@]}"
mapfile -t others < <(pinned transformers tokenizers compressed-tensors openai openai-harmony soundfile gguf aiohttp \
    fastapi uvicorn uvloop orjson msgspec pyzmq psutil requests pydantic python-multipart pybase64 setproctitle \
    prometheus-client partial-json-parser packaging einops pillow tqdm ipython interegular scipy sentencepiece \
    watchfiles xxhash zstandard jsonschema dill)
pip "${others[@]}"
# On all cores, as in setup_env.sh; templates are no valid Python.
"$dir/bin/python" -m compileall -q -j 0 -x '/tests/' "$dir/lib" >/dev/null || true
touch "$stamp"
echo "SGLang is installed in $dir"
