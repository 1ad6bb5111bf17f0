#!/usr/bin/env bash
# Grows the base that a recipe names into the grown checkpoint that it trains, unless that is there, or its method
# starts from the base itself. No GPU is needed. If it is killed, the same command resumes. One that is there with another
# FACTOR or other LAYERS than those named is a mistake, and so are these where the recipe says itself what grows.
#
#     launch/expand.sh RECIPE [--field value …]
#
# Variables:
#   FACTOR   how many times as wide a grown MLP becomes (default: the recipe's)
#   LAYERS   the layers whose MLPs grow (default: the recipe's)
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help_if_asked "$@"
check_numbers FACTOR
enter "$@"
install "$ROOT/requirements.txt"
shown=$(grow show "$1" grows base grown plans_growth growth "${@:2}")
mapfile -t shown <<<"$shown"
grows=${shown[0]} base=${shown[1]} grown=${shown[2]} growth=("${shown[@]:4}")
[[ $grows == True ]] || exit 0
if [[ ${FACTOR:-}${LAYERS:-} ]]; then
    [[ ${shown[3]} == False ]] ||
        die 2 "FACTOR, LAYERS: $1 says what grows (${growth[*]}); give --factor or --layers"
    growth=("--factor=${FACTOR:-2}" "--layers=${LAYERS:-all}")
elif [[ -d $grown && ${shown[3]} == False ]]; then
    exit 0
fi
mkdir -p "$(dirname "$grown")"
# Several jobs may need the same one: the first makes it, the others find it there.
exec 9>"$grown.lock"
flock 9 2>/dev/null || say "$grown.lock: this file system has no locks; see that no other job expands"
grow expand "$base" "$grown" --keep "${growth[@]}"
rm -f "$grown.lock"
