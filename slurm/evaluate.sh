#!/usr/bin/env bash
#SBATCH --job-name=agff-evaluate # names the log
#SBATCH --nodes=1                # machines
#SBATCH --ntasks-per-node=8      # ranks on each: one per GPU
#SBATCH --gpus-per-node=8        # every rank sees all of its machine's and takes the one of its local rank
#SBATCH --cpus-per-task=8        # for a rank and the processes that load its items
#SBATCH --mem=0                  # all memory of the machine: every rank holds the vectors of a set
#SBATCH --time=08:00:00          # what it has not scored by then, the same command scores
#SBATCH --requeue                # a lost machine brings the job back, and it continues with the set it was in
#SBATCH --output=slurm-%x-%j.out # in the clone: slurm-agff-evaluate-<job>.out
#SBATCH --open-mode=append       # one log for all turns
# A run's newest checkpoint or a release -> scores.json, one rank per GPU:
#   sbatch slurm/evaluate.sh releases/mmeb_qwen2vl_2b --mmeb_eval DATA/MMEB-eval --mmvp DATA/MMVP_VLM
# Other sizes need no editing: sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/evaluate.sh ...
# The same command again continues an evaluation that was stopped; one that ended is made again.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
cd "$PROJECT_DIR"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR                                       # rank 0 runs on the first node of the list
export MASTER_PORT="$((12000 + SLURM_JOB_ID % 20000))"   # ranks of a job agree, two jobs on one node do not collide

srun --ntasks-per-node="$NUM_GPUS_PER_NODE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
  python launcher/evaluate.py "$@"
