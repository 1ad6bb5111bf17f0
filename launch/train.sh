#!/usr/bin/env bash
# Trains as a recipe says, on all GPUs there are, or on the CPU.
#
#     launch/train.sh RECIPE [--field value …]
#
# On one machine through the deepspeed launcher; on the machines of a hostfile likewise; inside a Slurm allocation with
# srun, one task a GPU. Any field of the recipe can be given another value. Run again, it resumes from the last complete
# checkpoint. Exit codes: 0 done, 2 a mistake in what was asked for, 75 preempted with a checkpoint (in Slurm only), 1 a
# fault.
#
# Variables:
#   NPROC         ranks on each node: the number of GPUs, or 1 without; in Slurm what the job's --ntasks-per-node says
#   CUDA_VISIBLE_DEVICES   the GPUs to use, by number or UUID, or none if it is empty (default: all)
#   GPU_WAIT      nvidia-smi has so many seconds to list the GPUs (default: 30)
#   HOSTFILE      a file of lines "host slots=8": trains on these hosts, over pdsh and ssh (default: none)
#   MASTER_ADDR   where rank 0 is (default: here; with a hostfile its first host, in Slurm the first node)
#   MASTER_PORT   port of the rendezvous: a free one
#   INTERFACE, RANK_WAIT   in Slurm: see launch/rank.sh --help, slurm/grow_gemma4b.sh --help
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
#
# The hosts of a HOSTFILE have the checkout, the environment and this folder under the same names. Ranks there get this
# shell's variables, but for those of this machine and for secrets (…_TOKEN, …_KEY, PASSWORD): the hosts' own count, or
# those that ~/.deepspeed_env names.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/launch/hosts.sh"

help_if_asked "$@"
check_numbers NPROC MASTER_PORT RANK_WAIT GPU_WAIT
[[ -z ${HOSTFILE:-} || -z $CONTAINER ]] || die 2 "HOSTFILE and CONTAINER do not go together; in Slurm CONTAINER does"
way=on_this_machine
if in_allocation; then
    way=in_slurm
elif [[ -n ${HOSTFILE:-} ]]; then
    [[ -z ${NPROC:-} ]] || die 2 "NPROC and HOSTFILE do not go together: the slots of a host say how many ranks it has"
    read_hosts
    # DeepSpeed's launcher would start the ranks of a single host here, whichever it is.
    if ((${#hosts[@]} > 1)) || ! is_here "${hosts[0]}"; then way=on_hosts; else NPROC=${slots[0]}; fi
fi
[[ $way == in_slurm ]] || enter "$@"
install "$ROOT/requirements.txt"

on_this_machine() {
    local words=()
    if ((found == 0)); then
        local cores
        cores=$(nproc)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
    fi
    # The launcher knows devices by number alone, and takes the first NPROC of all. So it is not told which are visible,
    # but each rank is.
    [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || words=("CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
    env --unset=CUDA_VISIBLE_DEVICES deepspeed --quiet --no_local_rank --hostfile /dev/null --num_accelerators "$NPROC" \
        --master_port "$port" --no_python env "${words[@]}" "$@"
}

in_slurm() {
    # The ranks answer these; this script has to see how they end.
    trap : TERM USR1
    ranks "$@"
}

case $way in
    in_slurm)
        tasks=$(tasks_per_node)
        world=$((SLURM_JOB_NUM_NODES * tasks))
        ;;
    on_hosts)
        check_hosts
        check_launchers_file
        world=$(($(IFS=+ && echo "${slots[*]}")))
        ;;
    on_this_machine)
        found=$(gpus)
        ((found > 0)) || [[ ${CUDA_VISIBLE_DEVICES:--} =~ ^(-|NoDevFiles) ]] ||
            say "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names none of the GPUs that nvidia-smi lists here"
        NPROC=${NPROC:-$((found > 0 ? found : 1))}
        ((found == 0 || NPROC <= found)) || die 2 \
            "${HOSTFILE:+$HOSTFILE: slots or }NPROC=$NPROC: $found GPUs can be used here (CUDA_VISIBLE_DEVICES)"
        port=$(free_port "${MASTER_PORT:-0}") || die 2 "MASTER_PORT=$MASTER_PORT: this port cannot be had here; unset it"
        world=$NPROC
        ;;
esac

# Mistakes are found here, in one process and one line, before a launcher multiplies them; and the grown checkpoint is
# made here where the recipe names none.
run=$(WORLD_SIZE=$world grow train "$@" --expand --check)
if [[ -f $run/COMPLETE ]]; then
    echo "$run: done already"
    exit 0
fi

export PYTHONUNBUFFERED=1 # or a log on a file stands still
status=0
$way "$VENV/bin/grow" train "$@" || status=$?
# The deepspeed launcher returns 0 when a rank dies of a signal; the marker does not lie.
if [[ ! -f $run/COMPLETE ]]; then
    die $((status > 0 ? status : 1)) "$run: training did not finish (see above); run the same command again to resume"
fi
