#!/usr/bin/env bash
#SBATCH --job-name=agff-convert  # names the log
#SBATCH --nodes=1                # any machine without a GPU does
#SBATCH --ntasks=1               # one process
#SBATCH --cpus-per-task=8        # reading and writing are quicker with some
#SBATCH --mem=128G               # 4 bytes a parameter, twice, and room: enough for 8B
#SBATCH --time=02:00:00          # more than enough for 8B
#SBATCH --output=slurm-%x-%j.out # in the clone: slurm-agff-convert-<job>.out
# A run's newest checkpoint -> a release folder, on the CPU:
#   sbatch slurm/convert.sh runs/mmeb_qwen2vl_2b-zero2 releases/mmeb_qwen2vl_2b
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
cd "$PROJECT_DIR"

export DS_ACCELERATOR=cpu                                # converting needs memory, not a GPU

srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "${SRUN_OPTIONS[@]}" \
  python launcher/convert_checkpoint.py "$@"
