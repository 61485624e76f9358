#!/usr/bin/env bash
# Trains on several nodes under Slurm: sbatch scripts/slurm.sh [FILE or PRESET …] [--option=value …]
#
# Submit it from the clone, on a file system that all nodes share; data and out_dir must be there too. One launcher per
# node starts one process per GPU. If a process fails, all are restarted and resume. Two minutes before the time limit
# the job saves, goes back into the queue, and resumes when it starts again.
#SBATCH --job-name=folio
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / processes))}
# export NCCL_IB_DISABLE=1            # without InfiniBand
# export NCCL_SOCKET_IFNAME=eth0      # if a node has several networks

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds that a launcher gives its processes to save

trap 'kill -TERM "$launchers"; wait "$launchers" || true; scontrol requeue "$SLURM_JOB_ID"' USR1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$processes" --max_restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
    train.py "${@:-config/train_gpt2.py}" --init_from=auto &
launchers=$!
wait "$launchers"
