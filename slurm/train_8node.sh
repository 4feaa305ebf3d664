#!/usr/bin/env bash
#SBATCH --job-name=agff-train    # names the log
#SBATCH --nodes=8                # machines
#SBATCH --ntasks-per-node=8      # ranks on each: one per GPU
#SBATCH --gpus-per-node=8        # every rank sees all of its machine's and takes the one of its local rank
#SBATCH --cpus-per-task=8        # for a rank and the processes that load its data
#SBATCH --mem=0                  # all memory of each machine: loaders hold batches, whoever takes all GPUs takes it too
#SBATCH --time=24:00:00          # of one turn in the queue; the run continues in the next
#SBATCH --signal=B:USR1@300      # seconds before that limit: save and requeue
#SBATCH --requeue                # a lost machine brings the job back too
#SBATCH --output=slurm-%x-%j.out # in the clone: slurm-agff-train-<job>.out
#SBATCH --open-mode=append       # one log for all turns
# Eight nodes, one rank per GPU:
#   sbatch slurm/train_8node.sh --recipe mmeb_qwen2vl_2b [--loss.temperature 0.02 ...]
# Other sizes need no editing: sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/train_8node.sh ...
# The same command again continues the run from its newest checkpoint; at the time limit the job itself does so.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
source "$PROJECT_DIR/slurm/requeue.sh"
cd "$PROJECT_DIR"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR                                       # rank 0 runs on the first node of the list
export MASTER_PORT="$((12000 + SLURM_JOB_ID % 20000))"   # ranks of a job agree, two jobs on one node do not collide

# srun starts the entry point itself, once per GPU; launcher/run/ranks.py maps SLURM_* to RANK and its kin
run_and_requeue srun --ntasks-per-node="$NUM_GPUS_PER_NODE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
  python launcher/train.py "$@"
