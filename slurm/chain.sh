#!/usr/bin/env bash
# N jobs, each continuing the one before: for clusters that do not requeue. A job that finds all steps done ends at once.
#   bash slurm/chain.sh 5 slurm/train_8node.sh --recipe mmeb_qwen2vl_2b
set -euo pipefail
(($# >= 2)) || { echo "usage: slurm/chain.sh N SCRIPT [arguments]" >&2; exit 2; }
num_jobs=$1
shift

export MAX_RESTARTS=0 # the next job of the chain continues, so none goes back into the queue

previous=
for ((job = 1; job <= num_jobs; job++)); do
  previous=$(sbatch --parsable ${previous:+--dependency=afterany:$previous} "$@")
  previous=${previous%%;*} # a federation appends ";cluster"
  echo "job $job of $num_jobs: $previous"
done
