#!/usr/bin/env bash
# The test suite with another Python and another Megatron-Core than the pinned ones (README, "What has been verified
# where"), in an environment of its own:
#   bash tests/compat.sh PYTHON MEGATRON [TORCH] [pytest arguments]
#   bash tests/compat.sh python3.12 0.19.2 2.11.0
# Everything else is as in requirements-dev.txt. Which build of torch that is, is the package index's choice: the CUDA
# build, about 5.5 GB, runs on a CPU too. The environment stays in .venv-compat/ for the next time; remove it when done.
# Last, where .venv exists, a run that one of the two environments has begun goes on in the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
python=$1 megatron=$2
shift 2
torch=$(sed -n 's/^torch==//p' requirements.txt)
if [[ "${1:-}" =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]]; then
    torch=$1
    shift
fi
version=$("$python" -c 'import platform; print(platform.python_version())')
venv=.venv-compat/python-$version-megatron-$megatron-torch-$torch
if [ ! -f "$venv/.installed" ]; then
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
    # Some releases of torch want an older setuptools than the pinned one, and pip would rather change torch.
    grep -hvE '^(-r|torch==|megatron-core==|setuptools==)' requirements.txt requirements-dev.txt >"$venv/requirements.txt"
    "${pip[@]}" "torch==$torch"
    "${pip[@]}" -r "$venv/requirements.txt" "torch==$torch" "megatron-core==$megatron"
    "$venv/bin/python" -m compileall -q -j 0 -x '/tests/' "$venv/lib" >/dev/null || true
    touch "$venv/.installed"
fi
export OMP_NUM_THREADS=1 PATH="$PWD/$venv/bin:$PATH" PYTHONPATH=$PWD
"$venv/bin/python" -c 'from tests.support.resume_elsewhere import versions; print(versions())'
"$venv/bin/python" -m pytest -n 2 --dist loadfile -m "not sglang" "$@"
if [ -x .venv/bin/python ]; then
    "$venv/bin/python" -m tests.support.resume_elsewhere "$PWD/.venv/bin/python"
fi
