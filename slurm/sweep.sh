#!/usr/bin/env bash
# Every combination of recipes, methods, rates and seeds, as a job array; what is done is left out.
#
#     RECIPES="recipes/gemma3_1b/translation.yaml" METHODS="g_freeze sft" RATES="1e-5 5e-5" SEEDS="0 1" slurm/sweep.sh
#     STUDY=recipes/study/translation.yaml slurm/sweep.sh --seeds 0,1,2
#
# Of RECIPES arguments are fields for every run (--max_steps 200). Each run is a whole job as slurm/grow_gemma1b.sh is
# one; run the same command again and only what is missing is submitted. Of a STUDY they are those of
# recipes/study/run.py, which PARALLEL jobs run side by side in one folder, SWEEP, each on other cells of the grid.
#
# Variables:
#   RECIPES        files, separated by spaces (needed, unless there is a STUDY)
#   STUDY          a grid
#   METHODS        methods (default: g_freeze)
#   RATES          learning rates (default: each recipe's own)
#   SEEDS          seeds (default: 0)
#   SWEEP          the folder of its runs (default: runs/sweep)
#   PARALLEL       how many run at a time (default: 8)
#   SWEEP_SBATCH   sbatch options (default: one node with one GPU, four hours)
#   SITE_ENV, SCORES and others: see slurm/grow_gemma1b.sh --help
#SBATCH --job-name=grow-sweep
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
# In a job this file is a copy that Slurm has made; the repository is GROW_ROOT, or where it was submitted.
[[ -f ${GROW_ROOT:=$(dirname "$0")/..}/slurm/common.sh ]] || GROW_ROOT=${SLURM_SUBMIT_DIR:-.}
source "$GROW_ROOT/slurm/common.sh" || { echo "submit from the repository, or set GROW_ROOT to it" >&2 && exit 2; }

if [[ ${1:-} == --help ]]; then
    help_of "$0"
    exit 0
fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && -n ${STUDY:-} ]]; then # as a job: cells that no other job works on
    ready
    run=$SWEEP before=
    part "what is missing of $STUDY" \
        step 1 1 "$VENV/bin/python" "$ROOT/recipes/study/run.py" "$STUDY" --work "$SWEEP" "$@"
    note "done: nothing is left for this job"
    exit
fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # the line of its number in the list, and the fields of all
    IFS=$'\t' read -r -a words < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")
    whole_job "${words[@]}" "${@:2}"
    exit
fi

[[ -n ${RECIPES:-}${STUDY:-} ]] || die 2 "RECIPES is not set, nor STUDY; see slurm/sweep.sh --help"
command -v sbatch >/dev/null ||
    die 2 "there is no Slurm on this machine; launch/train.sh trains one run, recipes/study/run.py a grid of them"
site_settings
check_numbers PARALLEL FACTOR LIMIT ALPHA MASTER_PORT RANK_WAIT MIN_FREE_GB NPROC
install "$ROOT/requirements.txt"
SWEEP=${SWEEP:-runs/sweep}
mkdir -p "$SWEEP"
SWEEP=$(cd "$SWEEP" && pwd)
read -ra options <<<"${SWEEP_SBATCH:---nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8 --time=4:00:00}"

submit() { # submit COUNT WHAT ARGUMENT…: an array of so many jobs with these arguments
    local job
    export GROW_ROOT=$ROOT
    hand_settings_on
    job=$(sbatch --parsable --array="0-$(($1 - 1))%${PARALLEL:-8}" "${options[@]}" \
        "$ROOT/slurm/sweep.sh" "${@:3}" | cut -d ';' -f 1)
    echo "$job: $1 $2"
    echo "follow: squeue --jobs=$job; tail -F grow-sweep-${job}_*.out"
}

if [[ -n ${STUDY:-} ]]; then
    [[ -f $STUDY ]] || die 2 "STUDY=$STUDY: no grid there"
    STUDY=$(realpath "$STUDY")
    export STUDY SWEEP
    submit "${PARALLEL:-8}" "jobs, which share the cells of $STUDY" "$@"
    exit
fi
declare -A taken=() # the recipe of each run
list=$SWEEP/runs-$(date +%Y%m%d-%H%M%S)-$$.tsv
done=0

add() { # add RECIPE METHOD RATE SEED FIELDS…: to the list, unless it is done
    local name run words
    name=$(basename "$(dirname "$1")")-$(basename "$1" .yaml)
    run=$SWEEP/$name-$2${3:+-$3}-seed$4
    [[ -z ${taken[$run]:-} ]] ||
        die 2 "RECIPES: the run of $1 would have the folder of ${taken[$run]}, $run; name one's file or folder otherwise"
    taken[$run]=$1
    if [[ -f $run/COMPLETE && (-f $run-scores.json || ${SCORES:-} == none) ]]; then
        done=$((done + 1))
        return
    fi
    words=("$1" --method "$2" --seed "$4" --output_dir "$run")
    [[ -z $3 ]] || words+=(--learning_rate "$3")
    grow show "${words[@]}" "${@:5}" >/dev/null # a mistake is found here and not in the queue
    (IFS=$'\t' && echo "${words[*]}") >>"$list"
}
for recipe in $RECIPES; do
    for method in ${METHODS:-g_freeze}; do
        for rate in ${RATES:-""}; do
            for seed in ${SEEDS:-0}; do
                add "$recipe" "$method" "$rate" "$seed" "$@"
            done
        done
    done
done
[[ -f $list ]] || { echo "all $done runs are done" && exit 0; }
submit "$(wc -l <"$list")" "runs, listed in $list; $done were done already" "$list" "$@"
