#!/usr/bin/env bash
# The whole way round on a real Gemma 3 270M: fetch, grow, prove, train, consolidate, compare.
#
#     ./launch/demo.sh
#
# Sets up what it needs. Run again, it does not do twice what is done. Two CPU cores are enough; GPUs are used if there.
#
# Variables:
#   OUT          folder for runs, models and the report (default: runs/demo)
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
recipe=$ROOT/recipes/gemma3_270m/translation.yaml
base=$GROW_CACHE/gemma3_270m/model
grown=$GROW_CACHE/gemma3_270m/grown

say "1/6 a real Gemma 3 270M, English and French sentences, the world's capitals"
install "$ROOT/requirements.txt"
mkdir -p "$OUT/scores"
"$VENV/bin/python" "$ROOT/recipes/gemma3_270m/fetch.py" model translation capitals

say "2/6 growing it, offline"
[[ -d $grown ]] || grow expand "$base" "$grown"
grow plan "$base"

say "3/6 the grown model computes what the base does: all logits, torch.equal"
grow verify "$grown" --base "$base" --forward

say "4/6 training: G-Freeze on the grown model, then plain fine-tuning on the same rows"
for method in g_freeze sft; do
    "$ROOT/launch/train.sh" "$recipe" --method "$method" --output_dir "$OUT/$method" ${STEPS:+--max_steps "$STEPS"}
done

say "5/6 stock checkpoints of both, loaded with nothing but transformers"
for method in g_freeze sft; do
    [[ -d $OUT/$method-stock ]] || grow consolidate "$OUT/$method" "$OUT/$method-stock"
    (cd / && "$VENV/bin/python" -I - "$OUT/$method-stock" <<'END'
import sys

import transformers

model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
prompt = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("English: Good morning.\nFrench:", return_tensors="pt")
model.generate(**prompt, max_new_tokens=4, do_sample=False)
ours = sorted(name for name in sys.modules if name.partition(".")[0] == "grow")
assert not ours, f"this code was needed: {ours}"
print(f"{type(model).__name__}, intermediate_size {model.config.intermediate_size}: every key found its place")
END
    )
done

say "6/6 the new task and the old knowledge"
score() { # score NAME CHECKPOINT
    local file="$OUT/scores/${1// /_}.json"
    [[ -f $file ]] || grow eval "$2" --recipe "$recipe" --limit "$LIMIT" --samples 3 --name "$1" --out "$file" >/dev/null
}
score base "$base"
score "grown, step 0" "$grown"
score G-Freeze "$OUT/g_freeze-stock"
score SFT "$OUT/sft-stock"
grow report "$OUT/scores/base.json" "$OUT/scores/grown,_step_0.json" "$OUT/scores/G-Freeze.json" \
    "$OUT/scores/SFT.json" "$OUT/g_freeze" "$OUT/sft" --out "$OUT"
