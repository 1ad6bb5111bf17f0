# shellcheck shell=bash
# What the scripts in launch/ share; sourced, not run. What they share about Slurm is in allocation.sh.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HOME=${HOME:-~} USER=${USER:-$(id -un)} # a job that was submitted with --export=NONE may have none
OWN_VENV=${VENV:-}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-}
export GROW_CACHE=${GROW_CACHE:-$HOME/.cache/grow}

# CONTAINER names an image made of docker/Dockerfile, in which commands then run: IMAGE.sqsh with pyxis or enroot,
# IMAGE.sif with apptainer, any other name with docker. Scripts and recipes are this checkout's; Python, the packages and
# `grow` itself are the image's.
choose_environment() {
    [[ -z ${IN_IMAGE:-} ]] || CONTAINER= # no other inside it
    case ${CONTAINER:-} in
        *.sqsh | *.sif) CONTAINER=$(realpath --no-symlinks --canonicalize-missing "$CONTAINER") ;;
    esac
    export CONTAINER=${CONTAINER:-}
    [[ -z $CONTAINER ]] || export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
    VENV=${OWN_VENV:-${CONTAINER:+/opt/venv}}
    VENV=${VENV:-$ROOT/.venv}
    [[ $VENV == /* ]] || VENV=$PWD/$VENV
}
choose_environment

say() { printf '\n== %s\n' "$*" >&2; }

die() { # die CODE MESSAGE…: 2 is a mistake that the user can mend, 1 a fault
    local code=$1
    shift
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit "$code"
}

# Prints a script's opening comment, which says what it does and which variables it reads.
help_of() { awk 'NR == 1 { next } !/^#/ || /^#SBATCH/ { exit } { sub(/^# ?/, ""); print }' "$1"; }

# Of a script that needs arguments, a recipe first: its help, and the end, without any or with --help among them.
help_if_asked() {
    if [[ $# != 0 && " $* " != *" --help "* ]]; then
        [[ $1 != --* ]] || die 2 "name the recipe first: $(basename "$0") RECIPE $*"
        return 0
    fi
    help_of "$0"
    [[ $# != 0 ]] || exit 2
    exit 0
}

# The settings that are numbers: the least and the most that each may be. A point in the least allows fractions.
declare -A RANGES=(
    [NPROC]="1 9999" [MASTER_PORT]="1 65535" [RANK_WAIT]="0 86400" [CHECK_TIMEOUT]="1 86400" [GPU_WAIT]="1 3600" [MIN_FREE_GB]="0. 1e9"
    [FACTOR]="2 9999" [STEPS]="1 999999999" [LIMIT]="0 999999999" [ALPHA]="0. 1"
    [PILOT_STEPS]="1 999999999" [TOP]="1 9999" [PARALLEL]="1 9999"
)

# check_numbers NAME…: of these settings, each that is set must be such a number. A script calls it before all else.
check_numbers() {
    local name value least most
    for name in "$@"; do
        value=${!name-}
        read -r least most <<<"${RANGES[$name]}"
        [[ -z $value ]] || awk -v value="$value" -v least="$least" -v most="$most" 'BEGIN {
            whole = "^[0-9]+$"; fraction = "^([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?$"
            exit !(value ~ (least ~ /[.]/ ? fraction : whole) && value + 0 >= least + 0 && value + 0 <= most + 0)
        }' || die 2 "$name=$value: it must be a $([[ $least == *.* ]] || echo "whole ")number from ${least%.} to $most"
        [[ -z $value || $least == *.* ]] || printf -v "$name" %d "$((10#$value))" # 08 would be octal
    done
}

# What a container sees of this machine, each where it is here; a line each.
mounts() {
    local more paths=("$ROOT" "$PWD" "$GROW_CACHE" "$HF_HOME")
    mkdir -p "${paths[@]}"
    IFS=, read -ra more <<<"${CONTAINER_MOUNTS:-}"
    printf '%s\n' "${paths[@]}" "${more[@]}" | sort -u
}

# The variables that a container gets; apptainer and pyxis hand all of them on.
HANDED_ON=(GROW_CACHE HF_HOME HF_TOKEN HF_HUB_OFFLINE PYTHONPATH WORLD_SIZE NPROC CUDA_VISIBLE_DEVICES OMP_NUM_THREADS
    GPU_WAIT OUT SCORES LIMIT ALPHA FACTOR LAYERS STEPS MASTER_PORT TQDM_DISABLE)

# Fills the array `around` with what goes before a command, so that it runs in the container.
surround() {
    local path name option=--volume cuda
    cuda=$(gpus)
    case $CONTAINER in
        *.sif) around=(apptainer exec --pwd "$PWD") option=--bind ;;
        *.sqsh) around=(enroot start) option=--mount ;;
        *)
            around=(docker run --rm --init --ipc=host --user "$(id -u):$(id -g)" --workdir "$PWD")
            around+=(--env HOME=/tmp --env USER="$(id -un)")
            ;;
    esac
    while read -r path; do around+=("$option" "$path:$path"); done < <(mounts)
    if [[ $CONTAINER == *.sif ]]; then
        ((cuda == 0)) || around+=(--nv)
        around+=("$CONTAINER")
        return
    fi
    for name in "${HANDED_ON[@]}"; do [[ -z ${!name+set} ]] || around+=(--env "$name"); done
    [[ $CONTAINER == *.sqsh ]] || ((cuda == 0)) || around+=(--gpus all)
    around+=("$CONTAINER")
    [[ $CONTAINER != *.sqsh ]] || around+=(env -C "$PWD")
}

# inside COMMAND…: in the container, if there is to be one.
inside() {
    local around=()
    if [[ $CONTAINER == *.sqsh ]] && has_slurm; then
        step 1 1 "$@"
        return
    fi
    [[ -z $CONTAINER ]] || surround
    "${around[@]}" "$@"
}

# enter ARGUMENT…: runs the script that calls it in the container, all of it, if there is to be one.
enter() {
    [[ -n $CONTAINER ]] || return 0
    check_container
    inside "$ROOT/launch/$(basename "$0")" "$@"
    exit
}

check_container() {
    local program=docker
    [[ $CONTAINER != *.sif ]] || program=apptainer
    [[ $CONTAINER != *.sqsh ]] || program=enroot
    [[ $program == docker || -f $CONTAINER ]] || die 2 "CONTAINER=$CONTAINER: there is no such image (docker/README.md)"
    { [[ $program == enroot ]] && has_slurm; } || command -v "$program" >/dev/null ||
        die 2 "CONTAINER=$CONTAINER: $program is not on this machine"
}

grow() { inside "$VENV/bin/grow" "$@"; }

# Where the environment keeps what of a requirements file was installed.
installed() { echo "$VENV/installed-$(basename "$1")"; }

# Fills the array `missing` with those of these files that the environment does not have; all, if it has no Python.
find_missing() {
    local file
    missing=()
    for file in "$@"; do
        [[ -x $VENV/bin/python ]] && cmp -s "$file" "$(installed "$file")" || missing+=(-r "$file")
    done
}

# Where the environment's `grow` is imported from, without PYTHONPATH and the working directory; nothing if it has none.
its_grow() {
    "$VENV/bin/python" -I -c 'import importlib.util as u; spec = u.find_spec("grow"); print(spec and spec.origin or "")' \
        2>/dev/null || true
}

# has_this_checkout: whether the environment's `grow` is this checkout. One that belongs to another checkout is left alone.
has_this_checkout() {
    local its
    its=$(its_grow)
    [[ -n $its ]] || return 1
    [[ $its -ef $ROOT/grow/__init__.py ]] || die 2 "VENV=$VENV: its grow is ${its%/*}, not $ROOT/grow; name an" \
        "environment for this checkout, or let this one be it: $VENV/bin/pip install --no-deps -e $ROOT"
    [[ -x $VENV/bin/grow ]]
}

# check_image: of a script that runs inside an image, whose `grow` may be older or newer than this checkout's.
check_image() {
    local its
    ((${#missing[@]} == 0)) || die 2 "the image has not what ${missing[-1]} asks for; build it again (docker/README.md)"
    its=$(its_grow)
    [[ -n $its ]] || die 2 "the image has no grow; build it again (docker/README.md)"
    [[ ! -d $ROOT/grow ]] || diff -rq --exclude=__pycache__ --exclude='*.md' "$ROOT/grow" "${its%/*}" >/dev/null ||
        say "the image's grow is used, and it is not the same as $ROOT/grow (docker/README.md)"
}

# One process installs, others wait for it and find everything there. The lock is not empty while an environment is new:
# one that was killed then is begun again, and with it goes nothing but what was begun here.
install_missing() {
    local lock=$VENV/install.lock
    local pip=("$VENV/bin/pip" install --disable-pip-version-check --progress-bar off --quiet)
    { mkdir -p "$VENV" && touch "$lock"; } 2>/dev/null || die 2 "VENV=$VENV: cannot be written; name another place"
    (
        exec 8>>"$lock"
        if ! flock --nonblock 8; then
            say "waiting for another installation into $VENV"
            flock 8 || say "$lock: this file system has no locks; see that nothing else installs"
        fi
        find_missing "$@"
        ((${#missing[@]} == 0)) || install_requirements "$@"
        # Without a network too: torch has brought setuptools.
        has_this_checkout || "${pip[@]}" --no-deps --no-build-isolation --editable "$ROOT" ||
            die 1 "$ROOT could not be installed into $VENV"
        : >"$lock"
    )
}

install_requirements() { # install_requirements FILE…
    local file
    say "installing the requirements into $VENV (once)"
    [[ ! -s $lock ]] || find "$VENV" -mindepth 1 -maxdepth 1 ! -name install.lock -exec rm -rf {} +
    [[ -n $(find "$VENV" -mindepth 1 ! -name install.lock -print -quit) ]] || echo unfinished >"$lock"
    [[ -x $VENV/bin/python ]] || rm -f "$VENV"/bin/python* # links to a Python that is gone
    "$PYTHON" -m venv "$VENV" ||
        die 2 "no virtual environment could be made (on Debian: apt-get install python3-venv)"
    "${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${missing[@]}" ||
        die 1 "the requirements could not be installed"
    for file in "$@"; do cp "$file" "$(installed "$file")"; done
}

# install FILE…: a virtual environment with these requirements and this checkout, installed so that changes of its code
# count at once; quick when they are there already. An image has its own.
install() {
    if [[ -n $CONTAINER ]]; then
        check_container
        return
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die 2 "Python 3.11 or newer is needed, and $PYTHON is not one; name one: PYTHON=python3.11 $0"
    local missing
    find_missing "$@"
    if [[ -n ${IN_IMAGE:-} ]]; then
        check_image
    elif ! has_this_checkout || ((${#missing[@]})); then
        install_missing "$@"
    fi
    export PATH=$VENV/bin:$PATH
}

# free_port PORT [on HOST]: prints this port if it is free, or for 0 one that is; here or on a host of HOSTFILE.
free_port() {
    local code='import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); '
    code+='s.bind(("", int(sys.argv[1]))); print(s.getsockname()[1])'
    if (($# == 1)); then
        "$VENV/bin/python" -c "$code" "$1"
    else
        "${@:2}" "$VENV/bin/python -c '$code' $1"
    fi 2>/dev/null
}

# gpus: how many GPUs this shell may use, of those that nvidia-smi lists; an error of it lists none.
gpus() {
    local listed='' status=0 count
    if [[ ${CUDA_VISIBLE_DEVICES-unset} =~ ^(-|NoDevFiles|$) ]]; then # none, whatever there is
        echo 0
        return
    fi
    # One that hangs, since a GPU is broken, cannot always be killed, so it is not waited for.
    IFS= read -r -d '' -t "$GPU_WAIT" listed < <(exec nvidia-smi --list-gpus </dev/null 2>/dev/null) || status=$?
    if ((status > 128)); then
        kill -KILL $! 2>/dev/null || true
        die 2 "nvidia-smi does not answer: see to this machine's GPUs, or do without: CUDA_VISIBLE_DEVICES= $0"
    fi
    count=$(awk "$VISIBLE" <<<"$listed")
    ((count >= 0)) || die 2 "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: of MIG slices CUDA uses the first alone; name one"
    echo "$count"
}
GPU_WAIT=${GPU_WAIT:-30} # seconds; eight GPUs whose driver is not kept loaded take half of it

# CUDA's rules for CUDA_VISIBLE_DEVICES: numbers, or UUIDs or what only one UUID begins with. The list ends at the first
# entry that is no GPU here; an entry that stands there twice leaves none.
# shellcheck disable=SC2016 # awk's
VISIBLE='
function device(entry, name, found, count) {
    if (visible !~ /^(GPU|MIG)-/) {
        sub(/^ *[+]?/, "", entry)
        return entry ~ /^[0-9]/ && int(entry) < gpus ? int(entry) : ""
    }
    for (name in names) if (index(name, entry) == 1 && entry ~ /^(GPU|MIG)-./) { found = name; count++ }
    return entry in names ? entry : count == 1 ? found : ""
}
/^GPU [0-9]+:/ { gpus++ }
match($0, /[(]UUID: [^)]*/) { names[substr($0, RSTART + 7, RLENGTH - 7)] }
END {
    if (!("CUDA_VISIBLE_DEVICES" in ENVIRON)) { print gpus + 0; exit }
    visible = ENVIRON["CUDA_VISIBLE_DEVICES"]
    many = split(visible, entries, ",")
    for (i = 1; i <= many; i++) {
        if ((one = device(entries[i])) == "") break
        if (one in seen) { count = 0; break }
        seen[one]
        count++
    }
    print (count > 1 && visible ~ /^MIG-/ ? -1 : count + 0)
}'

# shellcheck source-path=SCRIPTDIR
source "$ROOT/launch/allocation.sh"
