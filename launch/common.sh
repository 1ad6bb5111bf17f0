# shellcheck shell=bash
# What the scripts in launch/ share; sourced, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-}
export GROW_CACHE=${GROW_CACHE:-$HOME/.cache/grow}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

say() { printf '\n== %s\n' "$*" >&2; }

die() { # die CODE MESSAGE…: 2 is a mistake that the user can mend, 1 a fault
    local code=$1
    shift
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit "$code"
}

# Prints a script's opening comment, which says what it does and which variables it reads.
help_of() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"; }

grow() { "$VENV/bin/python" -m grow "$@"; }

# Where the environment keeps what of a requirements file was installed.
installed() { echo "$VENV/installed-$(basename "$1")"; }

# install FILE…: a virtual environment with these requirements; quick when they are there already.
install() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die 2 "Python 3.11 or newer is needed, and $PYTHON is not one; name one: PYTHON=python3.11 $0"
    local file missing=()
    for file in "$@"; do
        cmp -s "$file" "$(installed "$file")" || missing+=(-r "$file")
    done
    if ((${#missing[@]})); then
        say "installing the requirements into $VENV (once)"
        "$PYTHON" -m venv "$VENV" ||
            die 2 "no virtual environment could be made (on Debian: apt-get install python3-venv)"
        "$VENV/bin/pip" install --disable-pip-version-check --progress-bar off --quiet \
            ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${missing[@]}" ||
            die 1 "the requirements could not be installed"
        for file in "$@"; do cp "$file" "$(installed "$file")"; done
    fi
    export PATH=$VENV/bin:$PATH
}

gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }
