#!/usr/bin/env bash
#SBATCH --job-name=agff-convert  # names the log
#SBATCH --nodes=1                # any machine without a GPU does
#SBATCH --ntasks=1               # one process
#SBATCH --cpus-per-task=4        # reading, writing, and two hashes of what is written
#SBATCH --mem=16G                # twice the largest tensor (8B in float32: 2.5 GB) and 2 GB of libraries, with room
#SBATCH --time=02:00:00          # more than enough for 8B
#SBATCH --output=slurm-%x-%j.out # in the clone: slurm-agff-convert-<job>.out
# A checkpoint of a run, the newest, -> a release folder, on the CPU, tensor by tensor:
#   sbatch slurm/convert.sh runs/mmeb_qwen2vl_2b-zero2 releases/mmeb_qwen2vl_2b
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
cd "$PROJECT_DIR"

export DS_ACCELERATOR=cpu                                # converting needs no GPU

srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-4}" "${SRUN_OPTIONS[@]}" \
  python launcher/convert_checkpoint.py "$@"
