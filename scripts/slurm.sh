#!/bin/bash
# One run on several nodes under SLURM; edit the lines below, then: sbatch scripts/slurm.sh
# Every node needs the same environment, and the run folder, model and data under the same paths.
#SBATCH --job-name=vcdeft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120  # two minutes before the end: the run saves and leaves
set -euo pipefail

GPUS=8  # of a node, as above
PORT=$((20000 + SLURM_JOB_ID % 20000))  # free on the first node: one of its own for each job
. .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS))

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$PORT" \
  -m visualcloze_deft train --config flux-8gpu-zero3 \
  --data graph200k=/shared/graph200k --output /shared/runs/flux "$@"
