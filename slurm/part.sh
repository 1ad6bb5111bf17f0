#!/usr/bin/env bash
# One part of a run as a job of its own; slurm/pipeline.sh submits these.
#
#     sbatch slurm/part.sh expanding|training|consolidating RECIPE [--field value …]
#
# Variables: see slurm/grow_gemma4b.sh --help
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# Slurm runs a copy of this file, from a folder of its own.
for ROOT in "${GROW_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ ! -f $ROOT/slurm/common.sh ]] || break
done
[[ -f $ROOT/slurm/common.sh ]] || { echo "submit from the repository's folder, or set GROW_ROOT to it" >&2 && exit 2; }
source "$ROOT/slurm/common.sh"

if [[ $# == 0 || $1 == --help ]]; then
    help_of "$0"
    exit 0
fi
[[ " expanding training consolidating " == *" $1 "* ]] || die 2 "$1: the parts are expanding, training, consolidating"
begin "${@:2}"
"$@"
finish
