# memento-rl with the CPU builds of torch and vLLM: the quickstart and the tests, on any machine.
#   docker build -f docker/cpu.Dockerfile -t memento-rl:cpu .
#   docker run --rm --shm-size=2g -v "$PWD/runs:/runs" memento-rl:cpu memento quickstart --out /runs/quickstart
FROM python:3.11-slim-bookworm

# A compiler for what vLLM and torch compile at the first start; unshare for the sandbox; ssh for Ray's cluster launcher.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git libnuma1 openssh-client procps rsync util-linux \
    && rm -rf /var/lib/apt/lists/*

ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_worker_niceness=0

WORKDIR /opt/memento-rl

# The libraries first: they stay in the cache while the code changes. The package itself is installed as a link to it, so the
# layer only needs what the installer reads.
COPY pyproject.toml README.md LICENSE ./
COPY scripts/install.sh scripts/install.sh
COPY memento/__init__.py memento/__init__.py
RUN PYTHON=python3.11 MEMENTO_PROFILE=cpu scripts/install.sh && rm -rf /root/.cache

COPY . .
RUN MEMENTO_PROFILE=cpu scripts/install.sh && memento --version

CMD ["memento", "--help"]
