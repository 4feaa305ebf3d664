#!/usr/bin/env bash
# Sourced by train_1node.sh and train_8node.sh. A run that is asked to stop saves a checkpoint and goes back into the queue.
# Who asks: --signal=B:USR1@300 before the time limit, preemption, `scancel --batch --signal=USR1 JOB`.
set -euo pipefail

patiently() { # CMD... : retried for two minutes when it fails, for example while Slurm's controller restarts
  local attempt
  for attempt in {1..12}; do
    ! "$@" || return 0
    ((attempt == 12)) || sleep "${RETRY_AFTER_S:-10}"
  done
  return 1
}

STOPPED_ON_REQUEST=75 # launcher/train.py: a checkpoint is written, the same command continues

run_and_requeue() { # CMD... : run it (an srun), exit with its code
  local asked=no interrupted=yes code=0 job
  trap 'asked=yes interrupted=yes; echo "slurm: asked to stop, signalling the ranks"; kill -USR1 "$srun_pid" || true' USR1 TERM
  "$@" &
  srun_pid=$!
  while [[ $interrupted == yes ]]; do # a signal ends `wait` early, while srun and its ranks still save
    interrupted=no code=0
    wait "$srun_pid" || code=$?
  done
  [[ $code == "$STOPPED_ON_REQUEST" || $code -gt 128 ]] || exit "$code"
  trap '' USR1 TERM # what comes now must not end this shell before it has asked for the requeue

  job=$(patiently scontrol --oneliner show job "$SLURM_JOB_ID") || job=" JobState=RUNNING " # nobody says otherwise
  # where Slurm warns the ranks itself it is seen by PreemptTime; --kill-on-bad-exit makes 143 or 137 of the last ranks' 75
  [[ $job != *" PreemptTime=2"* ]] || asked=yes
  if [[ $code == "$STOPPED_ON_REQUEST" || ($asked == yes && $code -gt 128) ]]; then
    if [[ $job != *" JobState=RUNNING "* ]]; then
      echo "slurm: stopped; the job is being ended from outside, which also decides whether it comes back"
    elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
      echo "slurm: stopped, and MAX_RESTARTS=$MAX_RESTARTS is reached; the same command continues"
    else
      echo "slurm: stopped; back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $MAX_RESTARTS)"
      patiently scontrol requeue "$SLURM_JOB_ID" || echo "slurm: this cluster does not requeue; the same command continues"
    fi
  fi
  exit "$code"
}
