# Settings of one site, sourced by every script here. Adapt this file; the scripts stay as they are.
# Partition and account: SBATCH_PARTITION and SBATCH_ACCOUNT in your shell, or options of sbatch.

PROJECT_DIR=${PROJECT_DIR:-${SLURM_SUBMIT_DIR:-$PWD}} # the clone, on a file system that all nodes see
VENV=${VENV:-$PROJECT_DIR/.venv}                      # made by `make install` on a node like the ones that train
NUM_GPUS_PER_NODE=${NUM_GPUS_PER_NODE:-8}             # must equal --ntasks-per-node

export PATH="$VENV/bin:$PATH"                                                # srun starts this environment's python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"                               # every rank would otherwise take all cores of its node
export HF_HUB_OFFLINE=1                                                      # compute nodes have no network: fail at once, not after retries
export TOKENIZERS_PARALLELISM=false                                          # the loader's workers fork; tokenizers threads do not survive it
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1                                     # a dead rank ends the others instead of leaving them waiting
export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/torch_extensions-$SLURM_JOB_ID" # a build lock on a shared home would stall every node
# export NCCL_SOCKET_IFNAME=ib0                                              # name it where a node has several networks
# export NCCL_IB_HCA=mlx5                                                    # name it where a node has adapters that are not for NCCL
