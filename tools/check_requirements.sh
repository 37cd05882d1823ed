#!/usr/bin/env bash
# Shows that the versions of requirements/{gpu,sglang,vllm}.txt fit together, by the metadata of the package index alone:
# nothing is installed, and no wheel of torch is downloaded. Needs uv (pip install uv).
#   bash tools/check_requirements.sh [PYTHON]         (3.11, 3.12: default 3.11)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || { echo "no uv: pip install uv" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Published as source that asks for torch, or for NVIDIA's own index, before it tells its requirements.
cat >"$scratch/uv.toml" <<'TOML'
[[dependency-metadata]]
name = "transformer-engine-torch"
version = "2.11.0"
requires-dist = ["torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect"]

[[dependency-metadata]]
name = "cuda-tile"
version = "1.6.0rc5"
requires-dist = []
TOML

python=${1:-3.11} status=0
for name in gpu sglang vllm; do
    # Without isolation, so that a build of any other package fails at once, and does not fetch torch for it.
    uv pip compile "requirements/$name.txt" --config-file "$scratch/uv.toml" --no-build-isolation --prerelease=allow \
        --python-version "$python" --python-platform x86_64-manylinux_2_34 --no-annotate --no-header --quiet >"$scratch/$name"
    echo "requirements/$name.txt: $(grep -c == "$scratch/$name") packages fit together"
done
for package in torch nvidia-nccl-cu13; do
    versions=$(cd "$scratch" && grep -H "^$package==" gpu sglang)
    if [ "$(cut -d: -f2 <<<"$versions" | sort -u | wc -l)" != 1 ]; then
        printf 'Not the same on both ends of the weight sync:\n%s\n' "$versions" >&2
        status=1
    fi
    grep -h "^$package==" "$scratch/gpu"
done
exit $status
