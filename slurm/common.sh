# shellcheck shell=bash
# What the scripts in slurm/ share; sourced, not run.

# shellcheck source-path=SCRIPTDIR/../slurm
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"

# need_job: without Slurm, or without a job of its own, a script says how it is meant to be used.
need_job() {
    command -v scontrol >/dev/null || die 2 "there is no Slurm on this machine; launch/train.sh trains without it"
    in_allocation || die 2 "this is a job: sbatch $0"
}

# One line of a job's diary.
note() { printf '%s job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*" >&2; }

# Preemption. TERM (preemption by another job, requeueing) has reached the steps too. USR1, before the time limit, comes
# to this script alone, which must live on to requeue the job: it passes the signal on to its steps, again and again, since
# one that comes while srun is still starting a step is lost.
preempted=
interrupted=
signaller=
on_signal() { # on_signal USR1|TERM
    interrupted=1
    [[ -z $preempted ]] || return 0
    preempted=1
    note "preempted ($1)"
    [[ $1 == USR1 ]] || return 0
    while :; do
        scancel --quiet --signal=USR1 "$SLURM_JOB_ID" || true
        sleep 10
    done &
    signaller=$!
}
stop_signalling() { [[ -z $signaller ]] || kill "$signaller" 2>/dev/null || true; }

# watched COMMAND…: runs it so that a signal is answered at once; for a command in the foreground bash would wait.
watched() {
    [[ -z $preempted ]] || return 75
    "$@" &
    local process=$! status
    while :; do
        interrupted=''
        status=0
        wait "$process" || status=$?
        [[ -n $interrupted ]] || return "$status"
    done
}

# claim RUN: only one job works on a run; a second one, submitted by mistake, leaves it alone. The claim is a link to
# the number of the job, which any file system makes at one stroke.
claim() {
    local holder state tries=0
    lock=$1.job
    mkdir -p "$(dirname "$lock")" || exit 2
    [[ -w $(dirname "$lock") ]] || die 2 "$(dirname "$lock"): cannot be written"
    while ! ln -s "$SLURM_JOB_ID" "$lock" 2>/dev/null; do
        if ! holder=$(readlink "$lock"); then
            [[ ! -e $lock ]] || die 2 "$lock: is in the way, and no job's claim; remove it"
            ((++tries < 5)) || die 1 "$lock: no link can be made there"
            sleep 1
            continue # its job has just ended
        fi
        [[ $holder != "$SLURM_JOB_ID" ]] || return 0
        # Only what Slurm says ends a claim; that it gives no answer for a while says nothing about the job.
        state=$(patiently job_state "$holder")
        [[ -n $state ]] || die 1 "Slurm does not say whether job $holder still works on $1, so it is left alone; submit again"
        if ! is_over "$state"; then
            note "job $holder works on $1 already; nothing to do"
            exit 0
        fi
        note "job $holder, which worked on $1, is over ($state)"
        rm -f "$lock"
        # Another job may find the same at the same moment, and remove this one's claim instead: so it is looked at again.
        ln -s "$SLURM_JOB_ID" "$lock" 2>/dev/null && sleep 2
    done
}

# patiently COMMAND…: asks Slurm until there is an answer, for five minutes; a controller restarts in less.
patiently() {
    local answer try
    for try in {1..20}; do
        answer=$("$@")
        [[ -z $answer ]] || break
        ((try == 20)) || sleep 15
    done
    echo "$answer"
}

# Settings that jobs read. SBATCH_EXPORT=NONE, or --export=NONE among a script's sbatch options, would keep from them even
# what the script itself sets.
SETTINGS=(HOME PATH USER LANG GROW_ROOT SITE_ENV GROW_CACHE HF_HOME HF_TOKEN HF_HUB_OFFLINE PYTHON VENV TORCH_INDEX CONTAINER
    CONTAINER_MOUNTS FACTOR LAYERS PILOT OUT SCORES LIMIT ALPHA STUDY SWEEP PARALLEL SKIP_CHECK RANK_WAIT MIN_FREE_GB
    CHECK_TIMEOUT INTERFACE MASTER_PORT NPROC GPU_WAIT)
# Adds to the array `options` what hands them on nevertheless.
hand_settings_on() {
    local name given=()
    [[ "--export=${SBATCH_EXPORT:-} ${options[*]}" =~ --export[=\ ](NONE|NIL) ]] || return 0
    for name in "${SETTINGS[@]}"; do [[ -z ${!name:-} ]] || { export "${name?}" && given+=("$name"); }; done
    options+=(--export="$(IFS=, && echo "${given[*]}")")
}

checkpoints() { compgen -G "$1/checkpoint-*/COMPLETE" || true; }

# again WHY: puts the job back into the queue; it resumes when it starts again. Does not return.
again() {
    local record try
    for try in {1..20}; do
        record=$(job_record "$SLURM_JOB_ID")
        if [[ $record == *JobState=* && $record != *JobState=RUNNING* ]]; then
            note "$1; the job is being ended"
            exit 75
        fi
        if [[ $record == *Requeue=0* ]]; then
            note "$1; requeueing is off: submit the same command again to resume"
            exit 75
        fi
        ((try > 1)) || note "$1; back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
        stop_signalling # or it would reach the job's next start
        trap - USR1 TERM
        if timeout 30 scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # Slurm ends this script
            exit 75
        fi
        sleep 10 # the controller does not answer
    done
    note "$1; Slurm did not take the job back: submit the same command again to resume"
    exit 75
}

# give_up_or_requeue STATUS WHAT: a part of the job did not end well. Does not return.
give_up_or_requeue() {
    [[ -z $preempted && $1 != 75 && $1 != $((128 + $(kill -l USR1))) ]] || again "preempted during $2"
    [[ $1 != 2 ]] || exit 2 # a mistake: the line that says which stands above
    # A fault, of a node perhaps. It is tried again once, and then for as long as that brings new checkpoints.
    [[ ${SLURM_RESTART_COUNT:-0} != 0 && $(checkpoints "$run") == "$before" ]] || again "$2 failed (exit $1)"
    note "$2 failed (exit $1), and no checkpoint was written since the last time: not tried again"
    exit 1
}

# part WHAT COMMAND…: a part of the job, all of which can be run again after whatever happened.
part() {
    local status=0
    note "$1"
    watched "${@:2}" || status=$?
    ((status == 0)) || give_up_or_requeue "$status" "$1"
}

# ready: every job's start, whatever it does.
ready() {
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    trap stop_signalling EXIT
    need_job
    site_settings
    check_numbers FACTOR LIMIT ALPHA MASTER_PORT RANK_WAIT MIN_FREE_GB CHECK_TIMEOUT NPROC GPU_WAIT
    # What launch/prepare.sh fetched is in the cache; asking the hub again could hang a node that has no way out.
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    install "$ROOT/requirements.txt"
    [[ -z $CONTAINER || ${INTERFACE:-} != auto ]] ||
        die 2 "INTERFACE=auto asks Slurm, which is not in a container; name the interface"
}

# begin RECIPE [--field value …]: the start of a job that works on one run.
begin() {
    ready
    local shown
    shown=$(grow show "$1" output_dir start "${@:2}")
    { read -r run && read -r start; } <<<"$shown"
    claim "$run"
    before=$(checkpoints "$run")
    note "$run on $SLURM_JOB_NODELIST"
}

expanding() { # launch/expand.sh knows whether there is anything to do
    # Of slurm/pipeline.sh --pilot: the field `layers` then names the ranking.
    [[ -z ${PILOT:-} || -f $run-ranking/ranking.json ]] ||
        part ranking step 1 1 "$VENV/bin/grow" rank "$PILOT" --out "$run-ranking"
    part expanding step 1 1 "$ROOT/launch/expand.sh" "$@"
}

training() { # likewise launch/train.sh, and whether a finished run is this recipe's
    [[ -n ${SKIP_CHECK:-} || -f $run/COMPLETE ]] ||
        part "checking the nodes" ranks "$VENV/bin/python" "$ROOT/slurm/check_node.py" "$(dirname "$run")" "$start"
    part training "$ROOT/launch/train.sh" "$@"
}

consolidating() { part "consolidating and scoring" step 1 1 "$ROOT/launch/consolidate.sh" "$@"; }

finish() {
    rm -f "$lock"
    note "done: $run"
}

# whole_job RECIPE [--field value …]: from the base to a stock checkpoint and its scores.
whole_job() {
    begin "$@"
    expanding "$@"
    training "$@"
    consolidating "$@"
    finish
}

# job_with RECIPE [ANOTHER] [--field value …]: a whole job with a recipe of its own, unless another is named.
job_with() {
    local recipe=$ROOT/$1
    shift
    if [[ ${1:-} == --help ]]; then
        job_help "${recipe#"$ROOT/"}"
        exit 0
    fi
    [[ ${1:---} != --* ]] || set -- "$recipe" "$@"
    whole_job "$@"
}

job_help() { # job_help RECIPE
    cat <<END
From a base to a stock checkpoint with its scores, in one job: expand, check the nodes, train on all of them,
consolidate, score.

    sbatch slurm/$(basename "$0") [RECIPE] [--field value …]

Submit it from the repository's folder. Without a RECIPE it is $1;
any of its fields can be given another value. What is done is not done again. Preempted, or near its time limit, the
job saves a checkpoint, requeues itself and resumes from there (with --no-requeue it ends, and resumes when it is
submitted again). Nodes and GPUs are sbatch's options; partition and account too, or variables (slurm/site.env.example).

Variables (slurm/README.md has all of them):
  GROW_ROOT     the repository (default: the folder that it was submitted from)
  SITE_ENV      a file of settings for this cluster, sourced (default: slurm/site.env, if it is there)
  SKIP_CHECK    1 leaves the check of the nodes out
  RANK_WAIT     when a rank is gone, the others have so many seconds to end by themselves (default: 30)
  CHECK_TIMEOUT the check's ranks have so many seconds to find each other (default: 30)
  MIN_FREE_GB   disk space that the check wants for checkpoints (default: 20)
  INTERFACE, MASTER_PORT, VENV: see launch/rank.sh --help; FACTOR, LAYERS: launch/expand.sh --help;
  OUT, SCORES, LIMIT, ALPHA: launch/consolidate.sh --help
END
}
