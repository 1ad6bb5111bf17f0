#!/usr/bin/env bash
# The whole way round on a real Gemma 3 270M: fetch, grow, prove, train, consolidate, compare.
#
#     ./launch/demo.sh
#
# Sets up what it needs. Run again, it does not do twice what is done. Two CPU cores are enough; GPUs are used if there.
# It says a line a step; what the steps say themselves is in OUT/demo.log.
#
# Variables:
#   OUT          folder for runs, models, the report and the log (default: runs/demo)
#   STEPS        training steps (default: the recipe's)
#   LIMIT        held-out rows of the task that are scored (default: 200)
#   NPROC        ranks (default: the number of visible GPUs, or 2 without)
#   GROW_CACHE   where the base model and the data are kept (default: ~/.cache/grow)
#   PYTHON       the Python, 3.11 or newer, that makes the virtual environment (default: python3)
#   VENV         the virtual environment (default: .venv)
#   TORCH_INDEX  another package index for torch (default: none)
#   CONTAINER    an image to run in, without a virtual environment (docker/README.md; default: none)
#   CONTAINER_MOUNTS   what else it sees of this machine: paths with commas between
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# != 0 ]]; then
    help_of "$0"
    [[ $1 == --help ]] && exit 0 || exit 2
fi
check_numbers STEPS LIMIT NPROC
enter "$@"
OUT=${OUT:-$ROOT/runs/demo}
LIMIT=${LIMIT:-200}
if [[ -z ${HOSTFILE:-} ]]; then
    found=$(gpus)
    export NPROC=${NPROC:-$((found > 0 ? found : 2))}
fi
export TQDM_DISABLE=${TQDM_DISABLE:-1} # a log has no use for progress bars
recipe=$ROOT/recipes/gemma3_270m/translation.yaml
base=$GROW_CACHE/gemma3_270m/model
grown=$OUT/grown
log=$OUT/demo.log
mkdir -p "$OUT/scores"
printf '%s: %s\n' "$(date +%FT%T)" "$0" >>"$log"

# doing TEXT COMMAND…: runs a step whose output goes to the log. Says what is done, how a training is getting on, and how
# long it took; of a step that fails, the last lines.
doing() {
    local text=$1 start=$SECONDS status=0
    shift
    printf '\n== %s\n' "$text" >>"$log"
    said_before=$(wc -c <"$log")
    [[ ! -t 2 ]] || printf '%s …' "$text" >&2
    { [[ $text != *training* ]] || show_progress "$text"; } &
    progress=$!
    trap stop_progress EXIT
    "$@" >>"$log" 2>&1 || status=$?
    stop_progress
    [[ ! -t 2 ]] || printf '\r\e[K' >&2
    if ((status > 0)); then
        of_this_step | tail -n 20 >&2
        die "$status" "$text: failed (exit $status); all of its output is in $log"
    fi
    printf '%-70s %4d s\n' "$text" $((SECONDS - start)) >&2
}

# show_progress TEXT: the latest line with a loss in it, or of the switch; on a terminal it takes the place of the one
# before.
show_progress() {
    local line='' latest
    while sleep 1; do
        latest=$(of_this_step | sed -n '/loss\|^switch:/ { /train_loss\|done,/ !h }; ${ x; p }' | tr -d "{}'")
        [[ -n $latest && $latest != "$line" ]] || continue
        line=$latest
        if [[ -t 2 ]]; then
            printf '\r\e[K%.*s' "$(($(tput cols 2>/dev/null || echo 80) - 1))" "$1 … $line" >&2
        else
            printf '     %s\n' "$line" >&2
        fi
    done
}
stop_progress() {
    kill "$progress" 2>/dev/null || return 0
    wait "$progress" 2>/dev/null || true
}

# of_this_step: what the step has said so far, a line each.
of_this_step() { tail -c +"$((said_before + 1))" "$log" | tr '\r' '\n'; }

# result TEXT: the lines of the step that has just ended with this text in them.
result() { of_this_step | sed -n "/$1/s/^/     /p" >&2; }

load_with_transformers() { # load_with_transformers CHECKPOINT
    "$VENV/bin/python" -I - "$1" <<'END'
import sys

import transformers

model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
prompt = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("English: Good morning.\nFrench:", return_tensors="pt")
model.generate(**prompt, max_new_tokens=4, do_sample=False)
ours = sorted(name for name in sys.modules if name.partition(".")[0] == "grow")
assert not ours, f"this code was needed: {ours}"
print(f"{type(model).__name__}, num_attention_heads {model.config.num_attention_heads}: every key found its place")
END
}

score() { # score NAME CHECKPOINT [OPTION …]
    local file="$OUT/scores/${1// /_}.json"
    [[ -f $file ]] ||
        doing "6/6 scoring: $1" grow eval "$2" --recipe "$recipe" --limit "$LIMIT" --samples 3 --name "$1" \
            --out "$file" "${@:3}"
}

printf 'The output of all steps goes to %s\n' "$log" >&2
install "$ROOT/requirements.txt"
doing "1/6 fetching a real Gemma 3 270M, rows to learn and rows to retain" \
    "$VENV/bin/python" "$ROOT/recipes/gemma3_270m/fetch.py" model translation capitals
[[ -d $grown ]] || doing "2/6 growing its query heads, offline" grow expand "$base" "$grown" --attention queries
doing "2/6 what has been added" grow plan "$base" --attention queries
result added:
doing "3/6 comparing every logit of the grown model with the base's" \
    grow verify "$grown" --base "$base" --forward
result "bit for bit"
doing "4/6 training: g_freeze, with a switch" "$ROOT/launch/train.sh" "$recipe" --grown "$grown" \
    --output_dir "$OUT/g_freeze" ${STEPS:+--max_steps "$STEPS"}
result "It opens for"
doing "4/6 training: sft" \
    "$ROOT/launch/train.sh" "$recipe" --method sft --output_dir "$OUT/sft" --lr_scheduler_type cosine --save_steps 24 \
    ${STEPS:+--max_steps "$STEPS"}
[[ -d $OUT/g_freeze-switched ]] ||
    doing "5/6 making a grown checkpoint, with its switch" \
        grow consolidate "$OUT/g_freeze" "$OUT/g_freeze-switched" --format grown
[[ -d $OUT/g_freeze-stock ]] || doing "5/6 making a stock checkpoint: g_freeze, always on" \
    grow consolidate "$OUT/g_freeze" "$OUT/g_freeze-stock" --uniform --without-switch
[[ -d $OUT/sft-stock ]] || doing "5/6 making a stock checkpoint: sft" grow consolidate "$OUT/sft" "$OUT/sft-stock"
for method in g_freeze sft; do
    doing "5/6 loading it with nothing but transformers: $method" load_with_transformers "$OUT/$method-stock"
    result "found its place"
done
score base "$base"
score "grown, step 0" "$grown"
score SFT "$OUT/sft-stock" --start "$base"
score "G-Freeze, always on" "$OUT/g_freeze-switched" --switch on
score "G-Freeze, with its switch" "$OUT/g_freeze-switched"
printf '6/6 the new task and retention\n\n' >&2
scores=("$OUT"/scores/{base,grown\,_step_0,SFT,G-Freeze\,_always_on,G-Freeze\,_with_its_switch}.json)
grow report "${scores[@]}" "$OUT/g_freeze" "$OUT/sft" --out "$OUT"
printf '\nDone in %d min %d s. Models, runs and the report are in %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$OUT" >&2
