# shellcheck shell=bash
# What the scripts in launch/ share; sourced, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OWN_VENV=${VENV:-}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-}
export GROW_CACHE=${GROW_CACHE:-$HOME/.cache/grow}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

# CONTAINER names an image made of docker/Dockerfile, in which commands then run: IMAGE.sqsh with pyxis or enroot,
# IMAGE.sif with apptainer, any other name with docker. This checkout is the code; the image has Python and packages.
choose_environment() {
    [[ -z ${IN_IMAGE:-} ]] || CONTAINER= # no other inside it
    case ${CONTAINER:-} in
        *.sqsh | *.sif) CONTAINER=$(realpath --no-symlinks --canonicalize-missing "$CONTAINER") ;;
    esac
    export CONTAINER=${CONTAINER:-}
    [[ -z $CONTAINER ]] || export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
    VENV=${OWN_VENV:-${CONTAINER:+/opt/venv}}
    VENV=${VENV:-$ROOT/.venv}
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

# Of a script that needs arguments: its help, and the end, without any or with --help among them.
help_if_asked() {
    [[ $# == 0 || " $* " == *" --help "* ]] || return 0
    help_of "$0"
    exit 0
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
    OUT SCORES LIMIT ALPHA FACTOR LAYERS STEPS MASTER_PORT TQDM_DISABLE)

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
    if [[ -n ${SLURM_JOB_ID:-} && $CONTAINER == *.sqsh ]]; then
        step 1 1 "$@"
        return
    fi
    [[ -z $CONTAINER ]] || surround
    "${around[@]}" "$@"
}

# enter ARGUMENT…: the script that calls it goes on in the container, all of it, if there is to be one.
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
    [[ -n ${SLURM_JOB_ID:-} && $program == enroot ]] || command -v "$program" >/dev/null ||
        die 2 "CONTAINER=$CONTAINER: $program is not on this machine"
}

grow() { inside "$VENV/bin/python" -m grow "$@"; }

# Where the environment keeps what of a requirements file was installed.
installed() { echo "$VENV/installed-$(basename "$1")"; }

# install FILE…: a virtual environment with these requirements; quick when they are there already. An image has them.
install() {
    if [[ -n $CONTAINER ]]; then
        check_container
        return
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die 2 "Python 3.11 or newer is needed, and $PYTHON is not one; name one: PYTHON=python3.11 $0"
    local file missing=()
    for file in "$@"; do
        cmp -s "$file" "$(installed "$file")" || missing+=(-r "$file")
    done
    if ((${#missing[@]})); then
        [[ -z ${IN_IMAGE:-} ]] || die 2 "the image has not what ${missing[-1]} asks for; build it again (docker/README.md)"
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

free_port() {
    "$VENV/bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }

# What the scripts in slurm/ set for this cluster: modules to load, where the caches are.
site_settings() {
    local file=${SITE_ENV:-$ROOT/slurm/site.env}
    # shellcheck source=/dev/null
    [[ ! -f $file ]] || source "$file"
    choose_environment
}

# The address by which Slurm knows a node: its name, or what the cluster was told to use instead.
node_address() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }

# step NODES TASKS_PER_NODE COMMAND…: a step of the job, one task a rank and nothing between Slurm and the rank.
step() {
    local nodes=$1 tasks=$2 cores=${SLURM_CPUS_ON_NODE:-1} around=()
    shift 2
    case $CONTAINER in
        '') ;;
        *.sqsh) # options of srun, from pyxis
            around=(--container-image="$CONTAINER" --container-workdir="$PWD"
                --container-mounts="$(mounts | sed 's/.*/&:&/' | paste -sd ,)")
            ;;
        *.sif) surround ;;
        *) die 2 "CONTAINER=$CONTAINER: in Slurm an image is a file, .sqsh for pyxis or .sif for apptainer" ;;
    esac
    # A rank that is gone leaves the others waiting for it: they are ended half a minute later. Ranks that leave
    # together, with a checkpoint, are done by then.
    srun --overlap --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$((cores > tasks ? cores / tasks : 1))" \
        --kill-on-bad-exit=0 --wait="${RANK_WAIT:-30}" "${around[@]}" "$@"
}

# How many ranks a node of this allocation has: one a GPU, unless the job says otherwise.
tasks_per_node() {
    local found=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    echo "${NPROC:-${found%%(*}}"
}

# ranks COMMAND…: the command as every rank of the allocation.
ranks() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${MASTER_ADDR:-$(node_address "$first")}
    export MASTER_ADDR
    step "$SLURM_JOB_NUM_NODES" "$(tasks_per_node)" "$ROOT/launch/rank.sh" "$@"
}
