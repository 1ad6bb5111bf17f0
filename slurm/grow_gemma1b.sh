#!/usr/bin/env bash
# Gemma 3 1B, the whole way: expand, check the nodes, train on all of them, consolidate, score.
#
#     sbatch slurm/grow_gemma1b.sh [RECIPE] [--field value …]
#
# Submitted from the repository's folder. Without a RECIPE it is recipes/gemma3_1b/translation.yaml; any of its fields
# can be given another value. What is done is not done again; asked to leave (time limit, preemption) the job leaves
# with a checkpoint, requeues itself and goes on from there (with --no-requeue it ends, and goes on when submitted
# again). Nodes and GPUs are sbatch's options; partition and account too, or variables (slurm/site.env.example).
#
# Variables:
#   GROW_ROOT     the repository (default: the folder that it was submitted from)
#   SITE_ENV      a file of settings for this cluster, sourced (default: slurm/site.env, if it is there)
#   SKIP_CHECK    1 leaves the check of the nodes out
#   RANK_WAIT     when a rank is gone, the others have so many seconds to end by themselves (default: 30)
#   CHECK_TIMEOUT the check's ranks have so many seconds to find each other (default: 30)
#   MIN_FREE_GB   disk space that the check wants for checkpoints (default: 20)
#   INTERFACE, MASTER_PORT, VENV: see launch/rank.sh --help; FACTOR, LAYERS: launch/expand.sh --help;
#   OUT, SCORES, LIMIT, ALPHA: launch/consolidate.sh --help
#SBATCH --job-name=grow-gemma1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# Slurm runs a copy of this file, from a folder of its own.
for ROOT in "${GROW_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ ! -f $ROOT/slurm/common.sh ]] || break
done
[[ -f $ROOT/slurm/common.sh ]] || { echo "submit from the repository's folder, or set GROW_ROOT to it" >&2 && exit 2; }
source "$ROOT/slurm/common.sh"

job_with "$ROOT/recipes/gemma3_1b/translation.yaml" "$@"
