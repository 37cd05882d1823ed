#!/usr/bin/env bash
# Proves the GPU paths on a machine with one NVIDIA GPU, and measures them: docs/gpu_acceptance.md.
#   bash tools/gpu_acceptance.sh [--wheels DIR] [--part N[,N]] [--model PATH] [--data DIR] [--python PYTHON] [--dry] OUT
#
#   --wheels DIR     wheels of what the Python lacks (tools/gpu/wheels.txt), installed into a temporary folder
#   --part N[,N]     1 head, 2 attention and step, 3 training, 4 a real model; may be repeated; default: all
#   --model PATH     of part 4: a Hugging Face folder, a .gguf file, or the first of the pieces into which `split` cut one
#   --data DIR       of part 4: train.jsonl, valid.jsonl and test_ood.jsonl in the project's own format
#   --python PYTHON  default: python3; with --dry .venv/bin/python where that exists
#   --dry            every part at toy size on the CPU: shows that nothing but the GPU is missing
#
# A part takes eight minutes at most. OUT gets summary.md, the log and the tables of each part, all as they come.
# Exit status: 0 if nothing failed, 1 if something did, 2 for wrong arguments.
set -uo pipefail
part_seconds=480 slower=1

die() {
    echo "gpu_acceptance.sh: $*" >&2
    exit 2
}
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

wheels="" parts="" model="" data="" python="" dry="" out=""
while (($#)); do
    case $1 in
    --wheels | --part | --model | --data | --python)
        (($# > 1)) || die "$1 needs a value"
        case $1 in
        --wheels) wheels=$(absolute "$2") ;;
        --part) parts="${parts:+$parts }${2//,/ }" ;;
        --model) model=$(absolute "$2") ;;
        --data) data=$(absolute "$2") ;;
        --python) python=$2 ;;
        esac
        shift 2
        ;;
    --dry) dry=1 && shift ;;
    -*) die "unknown option $1" ;;
    *)
        [ -z "$out" ] || die "one OUT, please: $out and $1"
        out=$(absolute "$1") && shift
        ;;
    esac
done
[ -n "$out" ] || die "where to? Name a folder OUT"
parts=${parts:-1 2 3 4}
for part in $parts; do [[ $part =~ ^[1-4]$ ]] || die "no part $part: 1, 2, 3 or 4"; done
case $python in */*) python=$(absolute "$python") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [ -z "$python" ]; then
    python=python3
    if [ -n "$dry" ] && [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; fi
fi
command -v "$python" >/dev/null || die "no $python"
mkdir -p "$out" || die "cannot write $out"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Nothing is left on the machine: caches of compilers go the way of everything else.
export XDG_CACHE_HOME=$scratch/cache TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton
export PYTHONPATH=$scratch/site:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    part_seconds=2400 slower=5 # two cores, perhaps with other work
fi

rows=() details=() failed=0 state=running
summary() {
    {
        echo "# GPU acceptance${dry:+ (dry run on the CPU)}"
        echo
        [ ! -f "$scratch/machine" ] || cat "$scratch/machine"
        echo "- Parts: $parts; $state"
        echo
        echo "| part | step | result | seconds |"
        echo "| --- | --- | --- | ---: |"
        printf '%s\n' ${rows[@]+"${rows[@]}"}
        bars=$(cat "$out"/gpu_*.md 2>/dev/null | grep -E ': \*\*(NOT MET|met)\*\*$')
        [ -z "$bars" ] || printf '\nWhat the pages have to show:\n\n%s\n' "$bars"
        printf '%s\n' ${details[@]+"${details[@]}"}
    } >"$scratch/summary" && cp "$scratch/summary" "$out/summary.md"
}

record() { # STEP RESULT SECONDS
    rows+=("| $part | $1 | $2 | $3 |")
    echo "part $part: $1: $2"
    summary
}
skip() { record "$1" "not run: $2" 0; } # STEP REASON

# Runs a step's command under its limit, and within what is left of the part's time.
step() { # NAME LIMIT COMMAND…
    local name=$1 limit=$(($2 * slower)) left=$((part_end - SECONDS)) log=$out/log_$part.txt start=$SECONDS status=0 before
    shift 2
    if ((left < 5)); then
        skip "$name" "the part's $part_seconds s are used up"
        return 1
    fi
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    before=$(stat -c %s "$log")
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >>"$log" 2>&1 </dev/null || status=$?
    if ((status == 0)); then
        record "$name" passed $((SECONDS - start))
        return 0
    fi
    failed=1
    details+=("" "## $name failed: exit status $status" "" '```' "$(tail -c "+$((before + 1))" "$log" | tail -n 15)" '```')
    local why="failed: exit status $status"
    if ((status == 124 || status == 137)); then why="failed: not done in time"; fi
    record "$name" "$why" $((SECONDS - start))
    return 1
}

# The first of the named Python modules that is missing, for a reason to skip; empty if all are there.
missing() {
    local module
    for module; do
        "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$module') is None)" 2>/dev/null ||
            { echo "no Python module $module (tools/gpu/wheels.txt)" && return; }
    done
}

source tools/gpu/parts.sh

part_end=$((SECONDS + part_seconds)) part=0
if [ -n "$wheels" ]; then
    if compgen -G "$wheels/*.whl" >/dev/null; then
        step "install the wheels" 120 "$python" -m pip install -q --no-index --no-deps --no-compile \
            --disable-pip-version-check --target "$scratch/site" "$wheels"/*.whl
    else
        failed=1
        record "install the wheels" "failed: no wheels in $wheels" 0
    fi
fi
step "imports" 120 "$python" tools/gpu/machine.py "$scratch/machine" ${dry:+--dry}
for part in $parts; do
    part_end=$((SECONDS + part_seconds))
    "part_$part"
done
state=finished
summary
echo "$out/summary.md"
exit $failed
