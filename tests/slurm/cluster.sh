#!/usr/bin/env bash
# A real Slurm of N nodes on this machine, for tests. Must be root; needs slurmctld, slurmd and slurm-client, nothing else.
#   cluster.sh up N           start, and wait until N nodes are idle
#   cluster.sh exec CMD...    run CMD as on the login node: sbatch, squeue, ...
#   cluster.sh kill-node K    node K loses its power: slurmd, batch shells and tasks are gone at once
#   cluster.sh down           stop everything, remove CLUSTER_DIR
# CLUSTER_DIR holds configuration, state and logs. The partition `high` preempts jobs of the partition `low` (the default).
# Every node is a process namespace: its end is the end of all that ran there. Its host name and /etc/hosts are its own.
set -euo pipefail

CLUSTER_DIR=${CLUSTER_DIR:?names the folder of the cluster}
export SLURM_CONF=$CLUSTER_DIR/slurm.conf # the programs of Slurm find the cluster by it, and we our own processes

alive() { # NAME : the unshare above slurmctld or a node, if it is still ours
  local pid
  pid=$(cat "$CLUSTER_DIR/pid/$1" 2>/dev/null) && grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null
}

power_on() { # NAME CMD... : a process namespace, detached from the caller's pipes
  setsid unshare --uts --mount --pid --fork --kill-child --mount-proc "${@:2}" </dev/null >>"$CLUSTER_DIR/log/$1" 2>&1 &
  echo $! >"$CLUSTER_DIR/pid/$1"
}

power_off() { # NAME : with the first process of its namespace the kernel ends all others; unshare returns after them
  while alive "$1"; do
    pkill -KILL -P "$(cat "$CLUSTER_DIR/pid/$1")" || true
    sleep 0.02
  done
}

start_node() { # K
  # bash stays as the namespace's first process because slurmd would not reap the slurmstepd that it leaves behind;
  # a real node's shared memory is its own too
  # shellcheck disable=SC2016
  power_on "node$1" bash -c '
    mount --bind "$1" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && hostname "$0" && slurmd -D -N "$0"; exit $?
  ' "node$1" "$CLUSTER_DIR/hosts"
}

write_configuration() { # N
  local k port=$((10000 + $$ % 400 * 20)) # below the ephemeral ports; two clusters on one machine differ
  # only character devices count as GPUs; these are clones of /dev/null
  for k in {0..7}; do mknod "$CLUSTER_DIR/gpu$k" c 1 3; done
  printf 'AutoDetect=off\nName=gpu File=%s/gpu[0-7]\n' "$CLUSTER_DIR" >"$CLUSTER_DIR/gres.conf"
  echo CgroupPlugin=cgroup/v1 >"$CLUSTER_DIR/cgroup.conf" # the one that starts where /sys/fs/cgroup is not mounted
  echo PMIxCliTmpDirBase=/dev/shm >"$CLUSTER_DIR/mpi.conf" # the nodes share /tmp, but each has its own shared memory
  cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
# no authentication: so nothing may listen beyond the loopback device
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# a requeued job waits until its old credential has expired
AuthInfo=cred_expire=5
FirstJobId=$((1 + $$ % 10000))
StateSaveLocation=$CLUSTER_DIR/state
SlurmdSpoolDir=$CLUSTER_DIR/spool/%n
SlurmctldPidFile=$CLUSTER_DIR/pid/daemon.slurmctld
SlurmdPidFile=$CLUSTER_DIR/pid/daemon.%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=4000
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=10
KillWait=5
UnkillableStepTimeout=120
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${CLUSTER_PREEMPT_SIGNAL:+SlurmctldParameters=preempt_send_user_signal}
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
CONF
  echo "127.0.0.1 localhost $(hostname)" >"$CLUSTER_DIR/hosts"
  for ((k = 1; k <= $1; k++)); do
    echo "127.0.0.1 node$k" >>"$CLUSTER_DIR/hosts"
    echo "NodeName=node$k NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + k)) CPUs=64 RealMemory=1000000 Gres=gpu:8" \
      >>"$SLURM_CONF"
  done
}

up() { # N
  mkdir -p "$CLUSTER_DIR"/{pid,log,state,spool}
  write_configuration "$1"
  power_on slurmctld slurmctld -D -c
  local k
  for ((k = 1; k <= $1; k++)); do start_node "$k"; done
  for ((k = 0; k < 300; k++)); do
    [[ $(sinfo --noheader --Node --partition=low --format=%T 2>/dev/null | grep -cx idle) != "$1" ]] || return 0
    sleep 0.1
  done
  tail -n 5 "$CLUSTER_DIR"/log/* >&2
  return 1
}

down() {
  local file
  for file in "$CLUSTER_DIR"/pid/{node*,slurmctld}; do power_off "${file##*/}"; done
  [[ ! -e $SLURM_CONF ]] || rm -rf "$CLUSTER_DIR"
}

case ${1:-} in
  up) up "$2" ;;
  exec) exec "${@:2}" ;;
  kill-node) power_off "node$2" ;;
  down) down ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
