# shellcheck shell=bash
# What the scripts in launch/ and slurm/ share about Slurm's jobs: their settings, whether they are there, and how they
# start ranks. Sourced by common.sh.

# What the scripts in slurm/ set for this cluster: modules to load, where the caches are. All of it reaches the ranks,
# exported or not; and what loads modules reads variables that are not set.
site_settings() {
    local file=${SITE_ENV:-$ROOT/slurm/site.env}
    [[ -z ${SITE_ENV:-} || -f $file ]] || die 2 "SITE_ENV=$file: there is no such file"
    VENV=$OWN_VENV
    set -a +u
    # shellcheck source=/dev/null
    [[ ! -f $file ]] || source "$file"
    set +a -u
    OWN_VENV=$VENV
    choose_environment
}

# has_slurm: whether this is a job, and Slurm's programs are here to start its steps. SLURM_JOB_ID is also left over in
# containers.
has_slurm() { [[ -n ${SLURM_JOB_ID:-} ]] && command -v srun >/dev/null && command -v scontrol >/dev/null; }

# job_record JOB: what Slurm's controller says of a job, a line NAME=VALUE for each word of it; JobState=UNKNOWN if there
# is no such job any more; nothing if it gives no answer, which says nothing about the job.
job_record() {
    local said
    said=$(timeout 30 scontrol --oneliner show job "$1" 2>&1) || true
    # Where the number is an array's too, all jobs of the array are shown.
    tr ' ' '\n' <<<"$said" | awk -F = -v job="$1" '$1 == "JobId" { ours = $2 == job } ours'
    [[ $said != *"Invalid job id"* ]] || echo JobState=UNKNOWN
}

# job_state JOB: likewise its state alone; squeue is asked where scontrol gives no answer.
job_state() {
    local state said
    state=$(job_record "$1" | sed -n 's/^JobState=//p')
    if [[ -z $state ]]; then
        said=$(timeout 30 squeue --noheader --jobs="$1" --format=%T 2>&1) || true
        state=$(grep --max-count=1 --line-regexp '[A-Z_]*' <<<"$said") || true
        [[ $said != *"Invalid job id"* ]] || state=UNKNOWN
    fi
    echo "$state"
}

# is_over STATE: whether a job in this state will not run any more.
is_over() {
    [[ $1 =~ ^(UNKNOWN|COMPLETED|FAILED|CANCELLED|TIMEOUT|OUT_OF_MEMORY|NODE_FAIL|PREEMPTED|DEADLINE|BOOT_FAIL|REVOKED) ]]
}

# in_allocation: whether Slurm has given this shell nodes to start ranks on. Ends the script where that is to be put right.
in_allocation() {
    local record state
    [[ -n ${SLURM_JOB_ID:-} ]] || return 1
    : "${SLURM_JOB_NUM_NODES:=${SLURM_NNODES:-}}" "${SLURM_JOB_NODELIST:=${SLURM_NODELIST:-}}"
    if ! has_slurm; then
        [[ ${SLURM_JOB_NUM_NODES:-1} == 1 ]] || die 2 "SLURM_JOB_ID=$SLURM_JOB_ID: srun is not here to start ranks on" \
            "the job's $SLURM_JOB_NUM_NODES nodes; start this where srun is, or unset SLURM_JOB_ID"
        say "SLURM_JOB_ID=$SLURM_JOB_ID, but srun is not here: on this machine alone"
        return 1
    fi
    ((${SLURM_STEP_NUM_TASKS:-1} == 1)) || refuse_tasks
    record=$(job_record "$SLURM_JOB_ID")
    state=$(sed -n 's/^JobState=//p' <<<"$record")
    # These two are also states of a job that is about to be requeued.
    [[ $state =~ ^(PREEMPTED|NODE_FAIL) ]] || ! is_over "$state" ||
        die 2 "SLURM_JOB_ID=$SLURM_JOB_ID: this job is over ($state); unset SLURM_JOB_ID, or get another allocation"
    : "${SLURM_JOB_NUM_NODES:=$(sed -n 's/^NumNodes=//p' <<<"$record")}"
    : "${SLURM_JOB_NODELIST:=$(sed -n 's/^NodeList=//p' <<<"$record")}"
    [[ -n $SLURM_JOB_NUM_NODES && -n $SLURM_JOB_NODELIST ]] ||
        die 2 "SLURM_JOB_ID=$SLURM_JOB_ID: Slurm does not say which nodes the job has; unset SLURM_JOB_ID to do without"
    export SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST
}

# Of a script that starts ranks and was itself started as several.
refuse_tasks() {
    ((${SLURM_PROCID:-0} == 0)) || exit 2
    die 2 "this is one of $SLURM_STEP_NUM_TASKS tasks of srun; it starts the ranks itself: run it once, without srun"
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
    # The ranks get this script's variables, whatever the job was submitted with (--export=NONE holds for steps too). A
    # step beside another one, such as an interactive shell, shares its resources; where it may not, it does not wait for
    # ever.
    srun --overlap --overcommit --immediate=300 --export=ALL --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$((cores > tasks ? cores / tasks : 1))" \
        --kill-on-bad-exit=0 --wait="${RANK_WAIT:-30}" "${around[@]}" "$@"
}

# How many ranks a node of this allocation has: one a GPU, unless the job says otherwise.
tasks_per_node() {
    local found=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} cards=${SLURM_GPUS_ON_NODE:-0}
    ((cards == 0 || ${NPROC:-0} <= cards)) || die 2 "NPROC=$NPROC: the job has $cards GPUs on each node"
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
