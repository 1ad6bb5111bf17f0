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
shown=$(grow show "$1" grows base grown factor layers attention attention_layers tower tower_layers train_projector "${@:2}")
mapfile -t shown <<<"$shown"
grows=${shown[0]} base=${shown[1]} grown=${shown[2]} factor=${shown[3]} layers=${shown[4]}
[[ $grows == True ]] || exit 0
[[ -z ${FACTOR:-}${LAYERS:-} || "$factor $layers ${shown[5]:-}${shown[7]:-} ${shown[9]:-}" == "2 all  False" ]] ||
    die 2 "FACTOR, LAYERS: $1 says what grows (layers $layers, attention ${shown[5]:-none}); give --factor or --layers"
[[ ! -d $grown || -n ${FACTOR:-}${LAYERS:-} ]] || exit 0
projector=$([[ ${shown[9]:-} != True ]] || echo --train-projector)
mkdir -p "$(dirname "$grown")"
# Several jobs may need the same one: the first makes it, the others find it there.
exec 9>"$grown.lock"
flock 9 2>/dev/null || say "$grown.lock: this file system has no locks; see that no other job expands"
grow expand "$base" "$grown" --keep --factor "${FACTOR:-$factor}" --layers "${LAYERS:-$layers}" \
    --attention "${shown[5]:-}" --attention-layers "${shown[6]:-}" --tower "${shown[7]:-}" --tower-layers "${shown[8]:-}" \
    ${projector:+"$projector"}
rm -f "$grown.lock"
