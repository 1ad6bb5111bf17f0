#!/usr/bin/env bash
# From a base to a stock checkpoint and scores in one job: sbatch this file. --help says what can be set.
#SBATCH --job-name=grow-gemma4-e2b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
recipe=recipes/gemma4_e2b/translation.yaml
# In a job this file is a copy that Slurm has made; the repository is GROW_ROOT, or where it was submitted.
[[ -f ${GROW_ROOT:=$(dirname "$0")/..}/slurm/common.sh ]] || GROW_ROOT=${SLURM_SUBMIT_DIR:-.}
source "$GROW_ROOT/slurm/common.sh" || { echo "submit from the repository, or set GROW_ROOT to it" >&2 && exit 2; }

job_with "$recipe" "$@"
