#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, and one run on it:
#   sbatch --nodes=4 configs/ray/slurm.sh configs/rl/qwen3_32b.yaml out=/shared/runs/first model=/shared/models/...
# The checkout (with its .venv) and the paths must lie on storage that all nodes see. Before its time limit Slurm sends SIGTERM; the
# run writes a checkpoint, and the requeued job goes on from it.
#SBATCH --job-name=memento
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=memento-%j.log
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch [--nodes=N] $0 CONFIG [a.b=c ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?this script runs under sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

port=${RAY_PORT:-6379}
dashboard=${RAY_DASHBOARD_PORT:-8265}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# A token of this job alone: everybody else on the cluster's network is refused.
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_worker_niceness=0 RAY_JOB_STOP_WAIT_TIME_S=800
ulimit -n 65536 || true

# --block: the processes belong to the job step, and end with it.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --block --node-ip-address="$address" --port="$port" --dashboard-host=0.0.0.0 \
    --dashboard-port="$dashboard" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --disable-usage-stats &
for ((i = 1; i < ${#hosts[@]}; i++)); do
    srun --nodes=1 --ntasks=1 --nodelist="${hosts[i]}" --overlap bash -c \
        "until ray start --block --address=$address:$port --num-gpus=${SLURM_GPUS_ON_NODE:-8} --disable-usage-stats; do sleep 5; done" &
done

export RAY_ADDRESS="http://$address:$dashboard"
until ray job list >/dev/null 2>&1; do sleep 2; done

id="memento-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
stop() {
    echo "SIGTERM: asking the run for a checkpoint"
    ray job stop "$id" || true # waits until the driver has ended
}
trap stop TERM

ray job submit --submission-id "$id" --no-wait --working-dir . -- python -m memento.rl.train "$@" --resume
ray job logs --follow "$id" &
wait $! || true # a signal ends the wait, and runs the trap
status=$(ray job status "$id" 2>&1)
echo "$status"
kill "$(jobs -p)" 2>/dev/null || true
[[ $status == *SUCCEEDED* ]]
