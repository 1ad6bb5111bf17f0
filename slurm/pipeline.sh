#!/usr/bin/env bash
# A run as three jobs, each of which starts when the one before it has succeeded: expand and consolidate on CPU nodes,
# train on GPU nodes. If one fails, Slurm cancels those after it (reason: DependencyNeverSatisfied).
#
#     slurm/pipeline.sh [--pilot] RECIPE [--field value …]
#
# With --pilot a fourth comes first: a short run of plain fine-tuning, RUN-pilot, by whose weight updates the layers are
# ranked (RUN-ranking); the MLPs of the best grow, into RUN-grown, instead of what the recipe says.
#
# Variables:
#   PILOT_STEPS  how many steps of the pilot (default: 100)
#   TOP          how many layers grow after it (default: 9)
#   GPU_SBATCH   sbatch options of the training (default: one whole node with eight GPUs, a day)
#   CPU_SBATCH   sbatch options of the other two (default: eight cores, 32 GB, two hours)
#   SCORES       where to score the result, which takes long without a GPU (default: none, it is not scored)
#   SITE_ENV and others: see slurm/grow_gemma4b.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help_if_asked "$@"
pilot=
if [[ $1 == --pilot ]]; then
    pilot=1
    shift
    help_if_asked "$@"
fi
command -v sbatch >/dev/null || die 2 "there is no Slurm on this machine; launch/ has the same steps without it"
site_settings
check_numbers PILOT_STEPS TOP FACTOR LIMIT ALPHA MASTER_PORT RANK_WAIT MIN_FREE_GB NPROC
install "$ROOT/requirements.txt"
read -ra gpu <<<"${GPU_SBATCH:---nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --exclusive --mem=0 --time=24:00:00}"
read -ra cpu <<<"${CPU_SBATCH:---nodes=1 --ntasks=1 --cpus-per-task=8 --mem=32G --time=2:00:00}"
export GROW_ROOT=$ROOT SCORES=${SCORES:-none}
# A mistake in the recipe is found here and not in the queue.
run=$(grow show "$1" output_dir "${@:2}")

arguments=("$@")
# without "--name …" RECIPE [--field value …]: into `arguments`, but for these fields, with - or _ in them.
without() {
    local names=" $1 " name
    shift
    arguments=()
    while (($#)); do
        name=${1%%=*}
        [[ $name != --* ]] || name=--$(tr - _ <<<"${name#--}")
        if [[ $names != *" $name "* ]]; then
            arguments+=("$1")
        elif [[ $1 != *=* ]]; then
            shift
        fi
        shift
    done
}
check() {
    grow show "${arguments[0]}" output_dir "${arguments[@]:1}" >/dev/null
}
submit() { # submit PART AFTER OPTION…: prints the job's number
    local options=("${@:3}")
    hand_settings_on
    sbatch --parsable --job-name="grow-$1" --kill-on-invalid-dep=yes ${2:+--dependency="afterok:$2"} "${options[@]}" \
        "$ROOT/slurm/part.sh" "$1" "${arguments[@]}" | cut -d ';' -f 1
}
piloting=
if [[ $pilot ]]; then
    mapfile -t nothing_else < <(grow show "$1" growth_defaults "${@:2}")
    without "--grown --layers ${nothing_else[*]%%=*}" "$@"
    arguments+=(--grown "$run-grown" "${nothing_else[@]}" "--layers=top:${TOP:-9}:$run-ranking/ranking.json")
    check
    after_pilot=("${arguments[@]}")
    without "--method --max_steps --output_dir --switch --average" "$@"
    arguments+=(--method sft --max_steps "${PILOT_STEPS:-100}" --average 1 --output_dir "$run-pilot")
    check
    piloting=$(submit training "" "${gpu[@]}")
    arguments=("${after_pilot[@]}")
    export PILOT=$run-pilot
fi
expand=$(submit expanding "$piloting" "${cpu[@]}")
train=$(submit training "$expand" "${gpu[@]}")
consolidate=$(submit consolidating "$train" "${cpu[@]}")
jobs=${piloting:+$piloting,}$expand,$train,$consolidate

cat <<END
${piloting:+$piloting pilot
}$expand expanding
$train training
$consolidate consolidating
run: $run
follow: squeue --jobs=$jobs; tail -F grow-*-{$jobs}.out
cancel: scancel ${jobs//,/ }
END
