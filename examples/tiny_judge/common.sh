# What the run*.sh share. Sourced by them, in the repository root.
out=${out:-runs/tiny_judge}
# A model of this size is no faster on two threads than on one; the second core has work of its own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

real_megatron() { .venv/bin/python -m real_megatron "$@"; }

make_task() { # further arguments of the task
    if [ ! -f "$out/task/model/config.json" ]; then
        .venv/bin/python -m real_megatron.data.tiny_judge --output "$out/task" "$@"
    fi
}

make_sft() { # [configuration]
    if [ ! -d "$out/sft/hf" ]; then
        real_megatron sft "${1:-examples/tiny_judge/sft.yaml}"
    fi
}
