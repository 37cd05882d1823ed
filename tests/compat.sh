#!/usr/bin/env bash
# The test suite with other versions than the pinned ones (README, "What has been verified where"), in an environment of
# its own:
#   bash tests/compat.sh PYTHON MEGATRON TORCH [NAME==VERSION …] [pytest arguments]
#   bash tests/compat.sh python3.12 0.19.2 2.11.0
#   bash tests/compat.sh python3.12 0.18.2 2.10.0 transformers==5.12.1 tokenizers==0.22.2 huggingface_hub==1.31.0
# What is not named is as in requirements/dev.txt. Which build of torch that is, is the package index's choice: the CUDA
# build, about 5.5 GB, runs on a CPU too. The environment stays in .venv-compat/ for the next time; remove it when done.
# Last, where .venv exists, a run that one of the two environments has begun goes on in the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
python=$1
versions=("torch==$3" "megatron-core==$2")
shift 3
while [[ "${1:-}" == *==* ]]; do
    versions+=("$1")
    shift
done
venv=.venv-compat/$("$python" -c 'import platform; print("python==" + platform.python_version())')
venv+=$(printf '_%s' "${versions[@]}")
if [ ! -f "$venv/.installed" ]; then
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
    # Without setuptools: some releases of torch want an older one than is pinned, and pip would rather change torch.
    named=$(printf '%s|' "${versions[@]%%==*}")
    grep -hvE "^(-r|setuptools==|(${named%|})==)" requirements/cpu.txt requirements/dev.txt >"$venv/requirements.txt"
    "${pip[@]}" "${versions[0]}"
    "${pip[@]}" -r "$venv/requirements.txt" "${versions[@]}"
    "$venv/bin/python" -m compileall -q -j 0 -x '/tests/' "$venv/lib" >/dev/null || true
    touch "$venv/.installed"
fi
export OMP_NUM_THREADS=1 PATH="$PWD/$venv/bin:$PATH" PYTHONPATH=$PWD
"$venv/bin/python" -c 'from tests.support.resume_elsewhere import versions; print(versions())'
"$venv/bin/python" -m pytest -n 2 --dist loadfile -m "not sglang and not vllm" "$@"
if [ -x .venv/bin/python ]; then
    "$venv/bin/python" -m tests.support.resume_elsewhere "$PWD/.venv/bin/python"
fi
