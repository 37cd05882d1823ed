#!/usr/bin/env bash
# Installs SGLang 0.5.21 for a machine without a GPU into a virtual environment of its own (its transformers is older
# than ours). Usage: bash tools/install_sglang_cpu.sh [DIR]      (default .venv-sglang; about 2.6 GB, one to two minutes)
# With a GPU use the ordinary `pip install sglang` instead.
set -euo pipefail
cd "$(dirname "$0")/.."

dir="${1:-.venv-sglang}"
python="${PYTHON:-python3.11}"
stamp="$dir/.sglang-cpu-0.5.21"

if [ -f "$stamp" ]; then
    echo "SGLang is installed in $dir"
    exit 0
fi

"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# Which wheel a plain `torch` is depends on the package index: the CPU build and the CUDA build both serve.
pip torch==2.13.0
# Without their dependencies: sglang's own list pulls CUDA kernels that a CPU machine neither needs nor can load.
pip --no-deps sglang==0.5.21 xgrammar==0.2.7 apache-tvm-ffi==0.1.11 triton==3.8.0 torchvision==0.28.0
pip transformers==5.12.1 tokenizers==0.22.2 compressed-tensors==0.18.0 openai==2.6.1 openai-harmony==0.0.4 \
    soundfile==0.13.1 gguf aiohttp fastapi uvicorn uvloop orjson msgspec pyzmq psutil requests pydantic python-multipart \
    pybase64 setproctitle prometheus-client partial_json_parser packaging einops pillow tqdm IPython interegular scipy \
    sentencepiece watchfiles xxhash zstandard jsonschema dill
touch "$stamp"
echo "SGLang is installed in $dir"
