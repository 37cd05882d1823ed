#!/usr/bin/env bash
# Runs the head's kernel tests on a GPU under compute-sanitizer: out-of-bounds accesses, then shared-memory races.
#
#     bash tests/head/compute_sanitizer.sh [python [memcheck | racecheck]]
#
# Needs a CUDA build of PyTorch, nvcc and compute-sanitizer. PyTorch's caching allocator would hide an access past the end
# of a tensor inside a larger block, so it is switched off.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python}
read -ra tools <<<"${2:-memcheck racecheck}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${tools[@]}"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "$python" -m pytest -q -p no:cacheprovider tests/head/test_logits.py tests/head/test_linear.py \
    -k "cuda and not emulated and not two_to_the_31"
done
