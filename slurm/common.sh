# shellcheck shell=bash
# What the scripts in slurm/ share; sourced, not run. ROOT is set by then.

# shellcheck source-path=SCRIPTDIR/../slurm
source "$ROOT/launch/common.sh"
ROOT=$(cd "$ROOT" && pwd)

# need_job: without Slurm, or without a job of its own, a script says how it is meant to be used.
need_job() {
    command -v scontrol >/dev/null || die 2 "there is no Slurm on this machine; launch/train.sh trains without it"
    [[ -n ${SLURM_JOB_ID:-} ]] || die 2 "this is a job: sbatch $0"
}

# One line of a job's diary.
note() { printf '%s job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*" >&2; }

# Slurm asks to leave. TERM (preemption, requeueing) has reached the steps too. USR1, before the time limit, comes to
# this script alone, which must live on to requeue the job: it passes the signal on to its steps, again and again, since
# one that comes while srun is still starting a step is lost.
asked=
interrupted=
signaller=
on_signal() { # on_signal USR1|TERM
    interrupted=1
    [[ -z $asked ]] || return 0
    asked=1
    note "asked to leave ($1)"
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
    [[ -z $asked ]] || return 75
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
    local holder
    lock=$1.job
    mkdir -p "$(dirname "$lock")" || exit 2
    [[ -w $(dirname "$lock") ]] || die 2 "$(dirname "$lock"): cannot be written"
    while ! ln -s "$SLURM_JOB_ID" "$lock" 2>/dev/null; do
        holder=$(readlink "$lock") || die 2 "$lock: is in the way, and no job's claim; remove it"
        [[ $holder != "$SLURM_JOB_ID" ]] || return 0
        if [[ -n $(squeue --noheader --jobs="$holder" 2>/dev/null) ]]; then
            note "job $holder works on $1 already; nothing to do"
            exit 0
        fi
        rm -f "$lock" # of a job that is no more
    done
}

checkpoints() { compgen -G "$1/checkpoint-*/COMPLETE" || true; }

# again WHY: puts the job back into the queue, from where it goes on. Does not return.
again() {
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
        note "$1; the job is being ended"
        exit 75
    fi
    if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'Requeue=1'; then
        note "$1; requeueing is off: submit the same command again to go on"
        exit 75
    fi
    note "$1; back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    stop_signalling # or it would reach the job's next start
    trap - USR1 TERM
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script
    exit 75
}

# settle STATUS WHAT: a part of the job did not end well. Does not return.
settle() {
    [[ -z $asked && $1 != 75 && $1 != $((128 + $(kill -l USR1))) ]] || again "left during $2"
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
    ((status == 0)) || settle "$status" "$1"
}

# ready: every job's start, whatever it does.
ready() {
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    trap stop_signalling EXIT
    need_job
    site_settings
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
    # Of slurm/pipeline.sh --pilot: LAYERS then names the ranking.
    [[ -z ${PILOT:-} || -f $run-ranking/ranking.json ]] ||
        part ranking step 1 1 "$VENV/bin/python" -m grow rank "$PILOT" --out "$run-ranking"
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
    local recipe=$1
    shift
    if [[ ${1:-} == --help ]]; then
        help_of "$0"
        exit 0
    fi
    [[ ${1:---} != --* ]] || set -- "$recipe" "$@"
    whole_job "$@"
}
