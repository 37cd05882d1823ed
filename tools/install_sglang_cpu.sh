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
pip() { "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }

# Which wheel a plain `torch` is depends on the package index: the CPU build and the CUDA build both serve.
pip torch==2.13.0
# Without their dependencies: sglang's own list pulls CUDA kernels that a CPU machine neither needs nor can load.
pip --no-deps sglang==0.5.21 xgrammar==0.2.7 apache-tvm-ffi==0.1.11 triton==3.8.0 torchvision==0.28.0
pip transformers==5.12.1 tokenizers==0.22.2 compressed-tensors==0.18.0 openai==2.6.1 openai-harmony==0.0.4 \
    soundfile==0.13.1 gguf==0.19.0 aiohttp==3.14.5 fastapi==0.165.0 uvicorn==0.54.0 uvloop==0.23.0 orjson==3.13.0 \
    msgspec==0.22.0 pyzmq==27.3.0 psutil==7.2.2 requests==2.34.2 pydantic==2.14.4 python-multipart==0.0.34 \
    pybase64==1.5.1 setproctitle==1.3.8 prometheus-client==0.26.0 partial_json_parser==0.2.1.1.post7 packaging==26.4 \
    einops==0.8.2 pillow==13.0.0 tqdm==4.70.1 IPython==9.18.1 interegular==0.3.3 scipy==1.17.1 sentencepiece==0.2.3 \
    watchfiles==1.3.0 xxhash==4.1.0 zstandard==0.25.0 jsonschema==4.26.0 dill==0.4.1
# On all cores, as in setup_env.sh; templates are no valid Python.
"$dir/bin/python" -m compileall -q -j 0 -x '/tests/' "$dir/lib" >/dev/null || true
touch "$stamp"
echo "SGLang is installed in $dir"
