#!/usr/bin/env bash
# Creates .venv in the repository root with pinned dependencies and the package itself (editable).
# Does nothing when it is already there: a stamp holds the hash of what was installed.
#   bash tools/setup_env.sh [requirements/cpu.txt | requirements/dev.txt | requirements/gpu.txt]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements/cpu.txt}
stamp=".venv/.installed-$(basename "$requirements")"
hash=$(cat requirements/*.txt setup.py pyproject.toml | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "real_megatron needs Python 3.11, 3.12 or 3.13, and none is on PATH: install it, then run this again." >&2
        exit 1
    fi
    echo "Creating .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "$python cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
echo "Installing $(grep '^torch==' requirements/cpu.txt)"
"${pip[@]}" -c requirements/cpu.txt "$(grep '^torch==' requirements/cpu.txt)"
isolation=()
if grep -q '^transformer-engine-torch==' "$requirements"; then
    # Its build asks for torch: for the one above, and not for another in an environment of the build's own.
    mapfile -t tools < <(grep -E '^(ninja|pybind11|wheel)==' "$requirements")
    "${pip[@]}" -r requirements/cpu.txt "${tools[@]}"
    isolation=(--no-build-isolation)
fi
echo "Installing $requirements"
"${pip[@]}" ${isolation[@]+"${isolation[@]}"} -r "$requirements"
# pip would compile on one core, and tests too. Files that are no valid Python (templates, tests of parsers) stay as they
# are, as they do with pip.
.venv/bin/python -m compileall -q -j 0 -x '/tests/' .venv/lib >/dev/null || true
echo "Installing real_megatron"
"${pip[@]}" --no-deps --no-build-isolation -e .
echo "$hash" >"$stamp"
