#!/usr/bin/env bash
# Trains as a recipe says, on this machine, through the deepspeed launcher.
#
#     launch/train.sh RECIPE [--field value …]
#
# Any field of the recipe can be given another value. Run again, it goes on from the last complete checkpoint.
# Exit codes: 0 done, 2 a mistake in what was asked for, 1 a fault.
#
# Variables:
#   NPROC         ranks: the number of GPUs, or 1 without
#   MASTER_PORT   port of the rendezvous: a free one
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# == 0 || " $* " == *" --help "* ]]; then
    help_of "$0"
    exit 0
fi
install "$ROOT/requirements.txt"

found=$(gpus)
NPROC=${NPROC:-$((found > 0 ? found : 1))}
MASTER_PORT=${MASTER_PORT:-$("$VENV/bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
if ((found == 0)); then
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
    # With more arenas glibc's allocator keeps what it was given, and memory creeps up step by step.
    export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1}
fi

# Mistakes are found here, in one process and one line, before a launcher multiplies them.
run=$(WORLD_SIZE=$NPROC grow train "$@" --check)
if [[ -f $run/COMPLETE ]]; then
    echo "$run: done already"
    exit 0
fi

status=0
deepspeed --no_local_rank --num_accelerators "$NPROC" --master_port "$MASTER_PORT" --module grow train "$@" || status=$?
# The launcher returns 0 when a rank dies of a signal; the marker does not lie.
if [[ ! -f $run/COMPLETE ]]; then
    die $((status > 0 ? status : 1)) "$run: training did not finish (see above); run the same command again to go on"
fi
