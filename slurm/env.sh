# Settings of one site, sourced by every script here. Adapt this file; the scripts stay as they are.
# What sbatch must know before a script runs belongs in your shell (~/.bashrc) or on its command line:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my_project

PROJECT_DIR=${PROJECT_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}               # the clone, on a file system that all nodes see
VENV=${VENV:-$PROJECT_DIR/.venv}                                    # made by `make install` on a node like the ones that train
NUM_GPUS_PER_NODE=${NUM_GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-8}} # one rank per GPU: what sbatch was asked for
MAX_RESTARTS=${MAX_RESTARTS:-100}                                   # requeues of a stopped run at most
SRUN_OPTIONS=()                                                     # a container: (--container-image=agff.sqsh --container-mounts="$PROJECT_DIR,/data" --container-workdir="$PROJECT_DIR")
# module load cuda/12.8                                             # what the site keeps in modules

export PATH="$VENV/bin:$PATH"                                                # srun starts this environment's python
export SLURM_EXPORT_ENV=ALL                                                  # the ranks get all this even after `sbatch --export=NONE`
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"                               # every rank would otherwise take all cores of its node
export HF_HUB_OFFLINE=1                                                      # compute nodes have no network: fail at once, not after retries
export TOKENIZERS_PARALLELISM=false                                          # the loader's workers fork; tokenizers threads do not survive it
export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/torch_extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" # a build lock on a shared home would stall every node
# export HF_HOME=/scratch/$USER/huggingface                                  # where the backbone was fetched to, if not in the home
# export NCCL_SOCKET_IFNAME=ib0                                              # name it where a node has several networks
# export NCCL_IB_HCA=mlx5                                                    # name it where a node has adapters that are not for NCCL
if [[ ! -e /dev/nvidiactl && ! -e /dev/kfd && ! -e /dev/dxg ]] && ! command -v nvidia-smi rocm-smi >/dev/null; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # no GPU driver on this node: DeepSpeed need not guess, and the ranks use gloo
  echo "slurm: $(hostname) has no GPU driver; DS_ACCELERATOR=$DS_ACCELERATOR"
fi
