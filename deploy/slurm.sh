#!/bin/bash
# Runs one curation on SLURM: a Ray node on every machine of the job, and the command on the first. Submit from the
# repository:
#
#     sbatch --nodes=4 deploy/slurm.sh --config CONFIG --output OUTPUT [--set a.b=value ...]
#
# Arguments after the script's name go to `python -m pipelines.curate` unchanged. Repository, sources and OUTPUT lie on
# a disk that every node sees. Give partition, account, time, cores and GPUs to sbatch, before the script's name. The
# number of workers is that of the cores; with GPUs, give --workers, the number of GPUs, after the script's name.
#
#SBATCH --job-name=seedbed-curate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# The job goes on when a node fails; other workers take its shards.
#SBATCH --no-kill
# SIGTERM two minutes before the end of the time, to this shell only, which passes it on (requeue, below).
#SBATCH --signal=B:TERM@120
set -euo pipefail

: "${SLURM_JOB_ID:?submit this with sbatch; without SLURM see docs/cluster.md}"
cd "$SLURM_SUBMIT_DIR"
python=${PYTHON:-.venv/bin/python}
cores=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node need two

# The token lets its holder run programs as this user, and Ray listens on every address. So each run has a new token, in
# a file on the shared disk that only this user can read. A command line and SLURM's records are visible to others.
secret=$(mktemp -d "$PWD/.seedbed-$SLURM_JOB_ID.XXXXXX") # mode 700
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$secret/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secret/token" RAY_USAGE_STATS_ENABLED=0
unset RAY_AUTH_TOKEN # it would take precedence over the file
temporary="/tmp/seedbed-$SLURM_JOB_ID" # on the local disk of each node; short, since a socket path has 107 characters

steps=()
finish() {
    trap - EXIT TERM
    if [ ${#steps[@]} -gt 0 ]; then
        kill -TERM "${steps[@]}" 2> /dev/null || true
        wait "${steps[@]}" || true
    fi
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --overlap --no-kill --kill-on-bad-exit=0 \
        rm -rf "$temporary" || true
    rm -rf "$secret"
}
trap finish EXIT

# Runs `ray` on some nodes of the job. The loss of a node does not end the step on the others.
ray_on() {
    local nodes=$1 where=$2
    shift 2
    srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$cores" "$where" --overlap --no-kill --kill-on-bad-exit=0 \
        "$python" -m ray.scripts.scripts start --block --num-cpus="$cores" --object-store-memory=209715200 \
        --temp-dir="$temporary" "$@" > /dev/null &
    steps+=($!)
}

address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "$python" -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')
ray_on 1 --nodelist="$head" --head --node-ip-address="$address" --port="$port" --include-dashboard=false
if [ "$SLURM_NNODES" -gt 1 ]; then
    ray_on $((SLURM_NNODES - 1)) --exclude="$head" --address="$address:$port"
fi
export RAY_ADDRESS="$address:$port"

# Waits for every node; a node that does not join within ten minutes ends the job with an error.
"$python" - "$RAY_ADDRESS" "$SLURM_NNODES" << 'END'
import sys
import time

import ray

deadline, num_nodes = time.monotonic() + 600, 0
while time.monotonic() < deadline:
    try:
        if not ray.is_initialized():
            ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
        num_nodes = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError):
        pass  # the head is not up yet
    if num_nodes == int(sys.argv[2]):
        sys.exit()
    time.sleep(1)
sys.exit(f"{num_nodes} of {sys.argv[2]} nodes joined Ray within 600 s. See the job's log, and Ray's in its --temp-dir.")
END

"$python" -m pipelines.curate --runner ray --workers $((SLURM_NNODES * cores)) "$@" &
driver=$!

# At the end of the time, the command stops in order; the job is queued again, and resumes the run.
requeue() {
    kill -TERM "$driver"
    wait "$driver" || true
    finish
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM

wait "$driver"
