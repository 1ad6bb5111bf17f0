#!/usr/bin/env bash
# One task of srun as one rank: finds out which, and lets the command that follows take its place, so that what Slurm
# signals is the rank itself.
#
#     srun launch/rank.sh grow train RECIPE
#
# Variables:
#   MASTER_ADDR   where rank 0 is (launch/train.sh sets it: the first node of the allocation)
#   MASTER_PORT   its port (default: one that follows from the numbers of the job and its step)
#   INTERFACE     the network interface for NCCL and gloo; "auto" is the one with this node's address (default: theirs)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# == 0 || $1 == --help ]]; then
    help_of "$0"
    exit 0
fi
[[ -n ${SLURM_PROCID:-} ]] || die 2 "this is a task of srun; launch/train.sh trains without"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
# Below the ports that systems give out by themselves; a step does not meet the sockets of the one before, nor a job
# those of its last start.
export MASTER_PORT=${MASTER_PORT:-$((15000 + (SLURM_JOB_ID * 64 + ${SLURM_RESTART_COUNT:-0} * 8 + SLURM_STEP_ID) % 15000))}
if [[ ${INTERFACE:-} == auto ]]; then
    address=$(getent ahostsv4 "$(node_address "$SLURMD_NODENAME")" | awk 'NR == 1 { print $1 }')
    INTERFACE=$(ip -oneline -4 address | awk -v address="$address" 'index($4, address "/") == 1 { print $2; exit }')
fi
if [[ -n ${INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
found=$(gpus)
if ((found == 0)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
fi
export TQDM_DISABLE=${TQDM_DISABLE:-1} # a log has no use for progress bars
exec "$@"
