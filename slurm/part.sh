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
# In a job this file is a copy that Slurm has made; the repository is GROW_ROOT, or where it was submitted.
[[ -f ${GROW_ROOT:=$(dirname "$0")/..}/slurm/common.sh ]] || GROW_ROOT=${SLURM_SUBMIT_DIR:-.}
source "$GROW_ROOT/slurm/common.sh" || { echo "submit from the repository, or set GROW_ROOT to it" >&2 && exit 2; }

if [[ $# == 0 || $1 == --help ]]; then
    help_of "$0"
    exit 0
fi
[[ " expanding training consolidating " == *" $1 "* ]] || die 2 "$1: the parts are expanding, training, consolidating"
begin "${@:2}"
"$@"
finish
