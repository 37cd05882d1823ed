# The parts of tools/gpu_acceptance.sh, sourced by it: what runs, at which size, in order of worth.
# Each list of arguments stands once; a dry run appends smaller sizes, of which the last one counts.

toy() { [ -z "$dry" ] || printf '%s\n' "$@"; } # the arguments, in a dry run alone
has_nvcc() { command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; }

# The head: build, tests (also of attention and of weights kept in pinned memory), benchmark, compute-sanitizer.
part_1() {
    local why kind=cuda device=cuda keyword="(cuda or gpu or spills) and not emulated" small
    if [ -n "$dry" ]; then kind=cpu device=cpu keyword="gemm or on_a_gpu"; fi
    if [ -n "$dry" ] || has_nvcc; then
        step "build the $kind kernels" 120 "$python" -m real_megatron.head.build "$kind"
    else
        skip "build the $kind kernels" "no nvcc"
    fi
    why=$(missing pytest hypothesis)
    if [ -n "$why" ]; then
        skip "tests on a GPU" "$why"
    else
        step "tests on a GPU" 180 "$python" -m pytest -q -p no:cacheprovider tests/head tests/policy/test_attention.py \
            tests/rollout/test_remote_kept.py -k "$keyword"
    fi
    mapfile -t small < <(toy --shape 64,512,32 --dtype float32 --repeats 1 --only "linear form")
    step "benchmark of the head" 150 "$python" -W ignore -m benchmarks.head --device "$device" --tables logits head \
        --output "$out/gpu_head.md" "${small[@]}"
    if [ -n "$dry" ]; then
        skip "compute-sanitizer" "dry run"
    elif ! command -v compute-sanitizer >/dev/null; then
        skip "compute-sanitizer" "no compute-sanitizer"
    elif [ -n "$why" ]; then
        skip "compute-sanitizer" "$why"
    else
        step "compute-sanitizer memcheck" 150 bash tests/head/compute_sanitizer.sh "$python" memcheck
        step "compute-sanitizer racecheck" 150 bash tests/head/compute_sanitizer.sh "$python" racecheck
    fi
}

# Attention under shared prompts, and the whole training step.
part_2() {
    local small
    mapfile -t small < <(toy --tokens 512 --error-tokens 96 --heads 4 --kv-heads 2 --dim 16 --mixes 2 --repeats 1)
    step "benchmark of attention" 180 "$python" -W ignore -m benchmarks.attention --output "$out/gpu_attention.md" \
        "${small[@]}"
    mapfile -t small < <(toy --k 2 --hidden 32 --ffn 64 --layers 1 --vocab 512 --heads 2 --kv-heads 1 --head-dim 16 \
        --repeats 1 --pairs 1)
    step "benchmark of the step, Qwen3-0.6B's size" 400 "$python" -W ignore -m benchmarks.step --k 8 16 4 --one-by-one \
        --hidden 1024 --ffn 3072 --layers 28 --vocab 151936 --heads 16 --kv-heads 8 --head-dim 128 --tied \
        --padded-tokens 8192 --output "$out/gpu_step.md" "${small[@]}"
    mapfile -t small < <(toy --hidden 32 --ffn 64 --layers 1 --vocab 512 --heads 2 --kv-heads 1 --head-dim 16 --steps 1)
    step "memory and time beside the plan, Qwen3-0.6B's size" 90 "$python" -W ignore -m benchmarks.scaling --ranks 1 \
        --prompts 4 --hidden 1024 --ffn 3072 --layers 28 --vocab 151936 --heads 16 --kv-heads 8 --head-dim 128 --tied \
        --output "$out/gpu_plan.md" "${small[@]}"
}

# The tiny judge on the GPU beside the CPU, resumed, and over many steps.
part_3() {
    local small
    mapfile -t small < <(toy --steps 3 --sft-steps 0 --prompts 2 --every 3 --train-rows 16 --test-rows 4)
    step "the tiny judge on GPU and CPU" 470 "$python" -W ignore -m benchmarks.training --output "$out/gpu_training.md" \
        "${small[@]}"
}

# A real model: convert, compare, train and evaluate.
part_4() {
    local hf=$model judged=$data cli=("$python" -W ignore -m real_megatron) why sizes
    if [ -n "$dry" ] && [ -z "$model$data" ]; then
        hf=$scratch/toy judged=$scratch/toy
        step "make a toy model and data" 60 "$python" -W ignore tools/gpu/toy_model.py "$scratch/toy" || return
    fi
    if [ -z "$hf" ]; then
        skip "a real model" "no --model"
        return
    fi
    if [ ! -d "$hf" ]; then
        why=$(missing gguf accelerate)
        if [ -n "$why" ]; then
            skip "a real model" "$why"
            return
        fi
        step "read the GGUF file" 120 "$python" -W ignore tools/gpu/gguf_to_hf.py "$hf" "$scratch/hf" || return
        hf=$scratch/hf
    fi
    step "convert, and compare its logits with transformers'" 120 "${cli[@]}" convert to-megatron "$hf" \
        "$scratch/megatron" --verify
    if [ -z "$judged" ]; then
        skip "train a real model" "no --data"
        return
    fi
    model_settings "$hf" "$judged" >"$scratch/model.yaml"
    mapfile -t sizes < <(toy steps=2 batch.prompts=2 rollout.n=2 data.max_prompt_tokens=64 data.max_response_tokens=24)
    step "sft of a real model" 150 "${cli[@]}" sft "$scratch/model.yaml" objective.name=raft output="$scratch/sft" \
        "${sizes[@]}"
    step "train a real model" 200 "${cli[@]}" train "$scratch/model.yaml" objective.name=real output="$scratch/real" \
        model.path="$scratch/sft/hf" optimizer.lr=1.0e-5 steps=20 "${sizes[@]}"
    step "evaluate a real model" 120 "${cli[@]}" evaluate "$scratch/model.yaml" --model "$scratch/real/hf" \
        --output "$scratch/evaluation"
    step "report of a real model" 60 "${cli[@]}" report "$scratch/sft" "$scratch/real" --output "$scratch/report" &&
        cp "$scratch/report/report.md" "$out/gpu_model.md"
}

model_settings() { # MODEL DATA
    cat <<YAML
steps: 60
output: unset
model: {path: $1}
optimizer: {lr: 1.0e-4, warmup_steps: 1, schedule: cosine}
batch: {prompts: 32, max_tokens: 8192}
objective: {no_anchor: force}
rollout: {n: 8}
data:
  max_prompt_tokens: 256
  max_response_tokens: 48
  train:
    - {path: $2/train.jsonl}
  eval:
    valid: {path: $2/valid.jsonl, limit: 100}
    out_of_domain: {path: $2/test_ood.jsonl, limit: 100}
checkpoint: {every: 0}
metrics: {tensorboard: false}
YAML
}
