# real_megatron for NVIDIA GPUs: the trainer with Transformer Engine in /opt/trainer, SGLang in /opt/sglang, each with its
# own transformers and both with one NCCL. Not yet built: checked are the versions (tools/check_requirements.sh 3.12) and
# this file (tests/test_dockerfile.py).
#   docker build -t real_megatron .
#   docker run --rm --gpus all --ipc=host --ulimit nofile=65536 real_megatron                  (says what it finds)
#   docker run --rm --gpus all --ipc=host --ulimit nofile=65536 -v /data:/data -w /data real_megatron \
#       torchrun --nproc-per-node 4 -m real_megatron train real.yaml rollout.python=/opt/sglang/bin/python
# Runs as user 10001, to whom outputs must be writable (or --user). No ssh server: Slurm and Kubernetes start containers
# themselves. A driver for CUDA 13.0 (580 or newer) must be on the host.
#
# devel: Triton, FlashInfer and the head's kernels compile at run time, too. NCCL loads libibverbs at run time.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-dev python3-venv g++ libnuma1 libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
ENV CUDA_HOME=/usr/local/cuda PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/real_megatron

COPY requirements/sglang.txt requirements/
RUN python3 -m venv /opt/sglang \
    && /opt/sglang/bin/python -m pip install --quiet -r requirements/sglang.txt

# As tools/setup_env.sh does it: torch alone, then what the build of Transformer Engine asks for, then that build. It takes
# some 4 GB of memory a job.
COPY requirements/cpu.txt requirements/gpu.txt requirements/
ARG MAX_JOBS=4
RUN python3 -m venv /opt/trainer \
    && pip="/opt/trainer/bin/python -m pip install --quiet" \
    && $pip "$(grep '^torch==' requirements/cpu.txt)" \
    && grep -E '^(ninja|pybind11|wheel)==' requirements/gpu.txt >/tmp/build.txt \
    && $pip -r requirements/cpu.txt -r /tmp/build.txt \
    && NVTE_FRAMEWORK=pytorch MAX_JOBS="$MAX_JOBS" $pip --no-build-isolation -r requirements/gpu.txt \
    && rm /tmp/build.txt

# Compiles the head's CUDA kernels with it. Editable: launchers run in this folder, whose package must be the compiled one.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY real_megatron real_megatron
RUN /opt/trainer/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
COPY examples examples
COPY docs docs

RUN useradd --create-home --uid 10001 real
USER real
ENV PATH=/opt/trainer/bin:$PATH
WORKDIR /home/real
CMD ["real-megatron", "doctor", "--python", "/opt/sglang/bin/python"]
