#!/usr/bin/env bash
# One launch/elastic.py (a torchrun) a node of a Slurm job. Change the lines below to your cluster, then, from the repository's root:
#
#     sbatch launch/clusters/slurm.sh launch/doctor.py --config launch/configs/ffhq256.yaml data.path=...
#     sbatch launch/clusters/slurm.sh launch/train.py --config launch/configs/ffhq256.yaml data.path=...
#
#SBATCH --job-name=sivae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Slurm puts a job that was preempted, or that lost a node, back into the queue by itself.
#SBATCH --requeue
#
# Five minutes before the limit this script (B:) is told; it saves and goes back into the queue.
#SBATCH --signal=B:USR1@300
set -euo pipefail
: "${1:?no program: launch/doctor.py or launch/train.py, then its arguments}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export SIVAE_LAUNCH="slurm-$SLURM_JOB_ID" # with run.new=true, a job that comes back resumes the run it began
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds to save; torchrun's default is 30

# To the tasks by scancel: srun itself kills its tasks at a SIGTERM.
stopping=
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# shellcheck disable=SC2016  # expanded on the nodes
srun --kill-on-bad-exit=1 bash -c 'exec python3 "$(dirname "$1")/elastic.py" \
  --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"' elastic "$@" &
step=$!
code=0
wait "$step" || code=$?
if [ -n "$stopping" ]; then
  wait "$step" || true # the trapped signal ended the first one
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
