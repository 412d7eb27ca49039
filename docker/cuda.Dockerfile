# memento-rl for GPUs.
#   docker build -f docker/cuda.Dockerfile -t memento-rl:cuda .
#   docker run --rm --gpus all --ipc=host -v /shared:/shared memento-rl:cuda memento doctor configs/rl/qwen3_8b.yaml
# The wheels of torch and vLLM bring their CUDA libraries; the base needs the compiler for kernels that are built at the first start,
# and must not be newer than the driver of the machines allows: --build-arg BASE=nvidia/cuda:... for another.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    build-essential git ibverbs-providers libibverbs1 libnuma1 openssh-client procps python3 python3-dev python3-venv rsync util-linux \
    && rm -rf /var/lib/apt/lists/*

ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_worker_niceness=0

WORKDIR /opt/memento-rl

# The libraries first: they stay in the cache while the code changes.
COPY pyproject.toml README.md LICENSE ./
COPY scripts/install.sh scripts/install.sh
COPY memento/__init__.py memento/__init__.py
RUN PYTHON=python3 MEMENTO_PROFILE=cuda scripts/install.sh && rm -rf /root/.cache

COPY . .
RUN MEMENTO_PROFILE=cuda scripts/install.sh && memento --version

CMD ["memento", "--help"]
