#!/bin/bash
# One training run on SLURM: torchrun on every node, one rank for each GPU. Submit from the repository:
#
#     sbatch --nodes=4 pipelines/launch/slurm.sh --config CONFIG --output OUTPUT [--set a.b=value ...]
#
# Arguments after the script's name are passed to `python -m training.train`. Repository, data and OUTPUT must be on a
# disk that every node sees. Give the cluster's options (partition, account, time, GPUs) to sbatch, before the script.
#
#SBATCH --job-name=seedbed-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Sends SIGTERM to the batch shell alone, three minutes before the time limit; `requeue` below passes it on.
#SBATCH --signal=B:TERM@180
set -euo pipefail

: "${SLURM_JOB_ID:?submit this with sbatch; without SLURM see docs/launch.md}"
cd "$SLURM_SUBMIT_DIR"
python=${PYTHON:-.venv/bin/python}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # so that two jobs on one node have different ports

srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:?no GPU was allocated: give sbatch --gpus-per-node}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$address:$port" \
    --max-restarts=0 \
    --shutdown-timeout=150 \
    -m training.train "$@" &
step=$!

# At the time limit, srun passes SIGTERM to every torchrun, and torchrun to its ranks, which save and exit. torchrun
# then exits with 1, as after any signal. The job is queued again and resumes where it stopped.
requeue() {
    trap '' TERM
    kill -TERM "$step"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM

wait "$step"
