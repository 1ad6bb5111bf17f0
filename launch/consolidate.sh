#!/usr/bin/env bash
# Makes a stock checkpoint of a finished run, RUN-stock, and scores it into RUN-scores.json; keeps what is there. Where
# only some layers have grown, the others are widened with zeros, since stock models have one width. A run with a switch
# becomes a grown checkpoint as well, RUN-switched, which is scored: stock models have none, so RUN-stock is always on. Of
# a LoRA with a switch it is RUN/result.
#
#     launch/consolidate.sh RECIPE [--field value …]
#
# Variables:
#   OUT      the checkpoint that is scored (default: the run's folder with -stock or -switched after its name)
#   SCORES   the file of scores; "none" scores nothing (default: the run's folder with -scores.json after its name)
#   LIMIT    score only so many held-out rows (default: all)
#   ALPHA    the interpolation coefficient α: 0 is the base, 1 as trained (default: 1); another's results are beside
#            those, RUN-stock-alpha0.5 and RUN-scores-alpha0.5.json
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help_if_asked "$@"
check_numbers LIMIT ALPHA
enter "$@"
install "$ROOT/requirements.txt"
shown=$(grow show "$1" output_dir switch method grows "${@:2}") # an empty line in the middle stays, one at the end not
{ read -r run && read -r switch && read -r method && read -r grows; } <<<"$shown"
[[ -f $run/COMPLETE ]] || die 2 "$run: training is not finished; run launch/train.sh first"
alpha=${ALPHA:-1} # at which it is scored; a stock checkpoint has it in its weights
at=$(awk -v alpha="$alpha" 'BEGIN { if (alpha != 1) print "-alpha" alpha + 0 }')
stock=$run-stock$at
OUT=${OUT:-${switch:+$run-switched}}
OUT=${OUT:-$stock}
SCORES=${SCORES:-$run-scores$at.json}

unless_there() { # unless_there FILE COMMAND…
    if [[ -e $1 ]]; then
        say "$1 is there already, and is kept"
    else
        "${@:2}"
    fi
}

if [[ $method == adapter || (-n $switch && $grows == False) ]]; then
    OUT=$run/result # an adapter is in no stock architecture, and a LoRA that is merged could not be off
elif [[ -n $switch ]]; then
    unless_there "$OUT" grow consolidate "$run" "$OUT" --format grown
    unless_there "$stock" grow consolidate "$run" "$stock" --alpha "$alpha" --uniform --without-switch
else
    unless_there "$OUT" grow consolidate "$run" "$OUT" --alpha "$alpha" --uniform
    alpha=1
fi
recipe=$1
(($# == 1)) || recipe=$run # by its own, which has the fields, and their rows
score() { # of which a part may fail; what is not whole is no reason to keep it
    grow eval "$OUT" --alpha "$alpha" --recipe "$recipe" --limit "${LIMIT:-0}" "--name=$(basename "$run")" \
        "--out=$SCORES.part" "${@:2}"
    mv "$SCORES.part" "$SCORES"
}
[[ $SCORES == none ]] || unless_there "$SCORES" score "$@"
