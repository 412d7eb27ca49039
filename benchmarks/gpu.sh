#!/usr/bin/env bash
# What needs a GPU and no vLLM, in one go: tests and benchmarks of kernels/, weights by CUDA IPC, and a Markdown table.
#
#     benchmarks/gpu.sh [FOLDER]          results in FOLDER (default runs/gpu), the table in FOLDER/report.md
#
# Needs a CUDA device and a Python (PYTHON=...) with torch, triton, numpy and pytest; trl and liger_kernel are compared
# with where they are installed. About ten minutes on one H200. A step that fails or takes too long is reported, and the
# others still run; the exit code is 1 then.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-runs/gpu}
mkdir -p "$out"
failed=0

run() { # NAME SECONDS COMMAND...: its output in NAME.log, its exit code in NAME.rc
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    PYTHONPATH=. PYTHONUNBUFFERED=1 timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    echo "$code" >"$out/$name.rc"
    [ "$code" = 0 ] || failed=1
}

has() { "$python" -c "import $1" 2>/dev/null; }

run tests 240 "$python" -m pytest -o addopts= --import-mode=importlib -p no:cacheprovider -q -m gpu \
    tests/kernels/test_triton_attention.py tests/kernels/test_triton_kernels.py tests/kernels/test_flex.py
has pydantic && run channel 120 "$python" -m pytest -o addopts= --import-mode=importlib -p no:cacheprovider -q -m gpu \
    tests/rollout/test_weight_channel.py
model=(--device cuda --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128)
run attention 180 "$python" benchmarks/attention.py "${model[@]}" --only causal triton flex --rounds 7 \
    --tokens 4096 8192 16384 32768 65536 --json "$out/attention.json"
run dense_mask 120 "$python" benchmarks/attention.py "${model[@]}" --only causal "dense mask" triton --rounds 3 \
    --tokens 4096 8192 16384 32768 --json "$out/dense_mask.json"
others=()
has trl && others+=(trl)
has liger_kernel && others+=(liger)
run logprob 180 "$python" benchmarks/logprob.py --device cuda --dtype bfloat16 --tokens 32768 --width 4096 \
    --words 151936 --only ours triton full "${others[@]}" --rounds 3 --json "$out/logprob.json"
run compaction 90 "$python" benchmarks/compaction.py --device cuda --layers 36 --kv-heads 8 --head-dim 128 \
    --requests 1 4 16 64 --rounds 21 --json "$out/compaction.json"
run visibility 60 "$python" benchmarks/visibility.py --device cuda
has transformers && run step 120 "$python" benchmarks/step.py --device cuda --dtype bfloat16 --tokens 32768 \
    --attention triton --json "$out/step.json"
"$python" benchmarks/gpu_report.py "$out" | tee "$out/report.md"
exit $failed
