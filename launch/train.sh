#!/usr/bin/env bash
# Trains as a recipe says, on all GPUs there are, or on the CPU.
#
#     launch/train.sh RECIPE [--field value …]
#
# On one machine through the deepspeed launcher; on the machines of a hostfile likewise; inside a Slurm allocation with
# srun, one task a GPU. Any field of the recipe can be given another value. Run again, it goes on from the last complete
# checkpoint. Exit codes: 0 done, 2 a mistake in what was asked for, 75 asked to leave and left with a checkpoint (in
# Slurm only), 1 a fault.
#
# Variables:
#   NPROC         ranks on each node: the number of GPUs, or 1 without; in Slurm what the job's --ntasks-per-node says
#   HOSTFILE      a file of lines "host slots=8": trains on these hosts, over ssh (default: none)
#   MASTER_ADDR   where rank 0 is (default: here; with a hostfile its first host, in Slurm the first node)
#   MASTER_PORT   port of the rendezvous: a free one
#   INTERFACE     in Slurm: see launch/rank.sh --help
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help_if_asked "$@"
[[ -z ${HOSTFILE:-} || -z $CONTAINER ]] || die 2 "HOSTFILE and CONTAINER do not go together; in Slurm CONTAINER does"
[[ -n ${SLURM_JOB_ID:-} ]] || enter "$@"
install "$ROOT/requirements.txt"

on_this_machine() {
    MASTER_PORT=${MASTER_PORT:-$(free_port)}
    if ((found == 0)); then
        local cores
        cores=$(nproc)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
    fi
    deepspeed --no_local_rank --num_accelerators "$NPROC" --master_port "$MASTER_PORT" --module grow train "$@"
}

on_hosts() {
    deepspeed --no_local_rank --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
        ${MASTER_PORT:+--master_port "$MASTER_PORT"} --module grow train "$@"
}

in_slurm() {
    # The ranks answer these; this script has to see how they end.
    trap : TERM USR1
    ranks "$VENV/bin/python" -m grow train "$@"
}

found=$(gpus)
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    way=in_slurm
    world=$((SLURM_JOB_NUM_NODES * $(tasks_per_node)))
elif [[ -n ${HOSTFILE:-} ]]; then
    way=on_hosts
    world=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | awk '{ n += $1 } END { print n + 0 }')
    ((world)) || die 2 "$HOSTFILE: no line such as \"node1 slots=8\" in it"
else
    way=on_this_machine
    NPROC=${NPROC:-$((found > 0 ? found : 1))}
    world=$NPROC
fi

# Mistakes are found here, in one process and one line, before a launcher multiplies them.
run=$(WORLD_SIZE=$world grow train "$@" --check)
if [[ -f $run/COMPLETE ]]; then
    echo "$run: done already"
    exit 0
fi

status=0
$way "$@" || status=$?
# The deepspeed launcher returns 0 when a rank dies of a signal; the marker does not lie.
if [[ ! -f $run/COMPLETE ]]; then
    die $((status > 0 ? status : 1)) "$run: training did not finish (see above); run the same command again to go on"
fi
