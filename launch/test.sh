#!/usr/bin/env bash
# Everything that a change should pass: linters, types, shellcheck, tests.
#
#     ./launch/test.sh                 what CI runs
#     ./launch/test.sh --full          and what takes long
#     ./launch/test.sh --gpu           on this machine's GPUs, what does other work there; all else runs without one
#     ./launch/test.sh --setup-only    only installs what the tests need
#     ./launch/test.sh tests/test_x.py -k name …    other arguments go to pytest, which then runs alone
#
# Variables:
#   TEST_PROCESSES   how many processes share all tests (default: 2)
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --help ]]; then
    help_of "$0"
    exit 0
fi
cd "$ROOT"
install requirements.txt tests/requirements-test.txt
# Slurm, so that jobs are tested on a real one; where it cannot be installed, those tests are skipped.
packages=()
command -v shellcheck >/dev/null || packages+=(shellcheck)
command -v slurmctld >/dev/null || [[ -x /usr/sbin/slurmctld ]] || packages+=(slurm-wlm slurm-client munge)
# And what builds an image.
[[ ${1:-} != --full ]] || { command -v buildah && command -v debootstrap; } >/dev/null || packages+=(buildah debootstrap)
if ((${#packages[@]})) && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "installing ${packages[*]}"
    # Their own services are not wanted here, and have no configuration to start with.
    { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --yes "${packages[@]}"; } >/dev/null 2>&1 ||
        say "could not be installed"
fi
command -v shellcheck >/dev/null || die 2 "shellcheck is missing (on Debian: apt-get install shellcheck)"
"$VENV/bin/python" recipes/gemma3_270m/fetch.py model translation capitals
[[ ${1:-} != --setup-only ]] || exit 0

if [[ $# == 0 || $1 == --full ]]; then
    say "ruff, mypy, shellcheck"
    "$VENV/bin/ruff" check .
    "$VENV/bin/ruff" format --check .
    "$VENV/bin/mypy"
    shellcheck --external-sources --source-path=SCRIPTDIR launch/*.sh slurm/*.sh .ci/run
fi
say "pytest"
several=()
if [[ $# == 0 || $1 == --full ]]; then
    # A file's tests stay together, since they share what they have made. With one thread each, processes do not get in
    # each other's way.
    several=(--numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
"$VENV/bin/python" -m pytest "${several[@]}" "$@"
