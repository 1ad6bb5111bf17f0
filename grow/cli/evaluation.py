"""Commands that score checkpoints, and that choose the interpolation coefficient α.

Heavy imports happen inside a command, so that --help answers at once.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grow.cli.arguments import number
from grow.cli.format import alpha_text, answer_text, eval_text, layer_alphas_text, say
from grow.errors import Fault, UserError


def eval(
    checkpoint: str, recipe: str = "", alpha: str = "1", start: str = "", against: str = "", samples: str = "0",
    limit: str = "0", retention_limit: str = "0", lm_eval: str = "", include_path: str = "", switch: str = "auto",
    generate: str = "0", shots: str = "0", name: str = "", out: str = "", json: bool = False, **fields: str,
) -> str:  # fmt: skip
    """Scores a checkpoint on the recipe's test rows and on retention rows, with 95 % intervals, at one α or several.

    Example: grow eval ~/models/gemma-3-270m-french --recipe recipes/gemma3_270m/translation.yaml
    Example: grow eval runs/sft-stock --start BASE --alpha 0,0.5,1 --recipe recipes/gemma3_270m/maths.yaml
    Example: grow eval runs/sft-stock --lm-eval winogrande,arc_easy

    Args:
        checkpoint: A stock or a grown checkpoint, or what a run by `adapter` ends in (RUN/result).
        recipe: The recipe whose task and retention rows are scored, or a run, by its own. Its fields can be given other
            values.
        alpha: The interpolation coefficient: 0 is the base, 1 as trained; or several values, with commas.
        start: The base of a stock checkpoint: its weights are interpolated with the base's. One that has grown has
            other shapes; it is compared with its base at α = 1.
        against: A file of the base's scores, to compare retention with row by row; or include 0 among the α.
        samples: For how many test rows to show what the model writes.
        limit: Score only so many test rows (of each task of lm-eval, too); 0 is all.
        retention_limit: Score only so many rows of each retention set; 0 is all.
        lm_eval: Tasks of lm-evaluation-harness, with commas.
        include_path: A folder of more such tasks.
        switch: "auto", as the model's was fitted, "on" or "off".
        generate: Score what is written, greedily, after each retention question: so many tokens at most; 0 is none.
        shots: Put so many other questions with their answers before each of these.
        name: What to call it in a report; the folder's name unless given.
        out: Write the result to this file, for `report`.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.checkpoint.shards import read_json
    from grow.methods import read_recipe

    if not recipe and not lm_eval:
        raise UserError("eval: name what to score it on: --recipe FILE, or --lm-eval TASK,TASK")
    settings = read_recipe(recipe, fields) if recipe else None
    flags = {
        "--limit": limit, "--retention-limit": retention_limit, "--samples": samples, "--generate": generate,
        "--shots": shots,
    }  # fmt: skip
    counts = {flag: number(flag, value) for flag, value in flags.items()}
    for flag, count in counts.items():
        if count < 0:
            raise UserError(f"{flag} {count}: 0 or more")
    most, most_known, shown, tokens, before = counts.values()
    if before and not tokens:
        raise UserError("--shots: goes with --generate TOKENS")
    alphas = tuple(number("--alpha", part, float) for part in alpha.split(","))
    if against and not Path(against).is_file():
        raise UserError(f"--against {against}: no such file")
    if out and Path(out).is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    base = read_json(Path(against)) if against else None

    from grow.checkpoint.files import write_json
    from grow.evaluation.answers import Answers
    from grow.evaluation.evaluate import evaluate
    from grow.evaluation.harness import Harness

    harness = Harness(lm_eval.split(","), include_path, most or None).scores if lm_eval else None
    result = evaluate(
        checkpoint, settings, alphas, shown, most or None, most_known or None, start, base, harness, switch,
        Answers(tokens, before) if tokens else None,
    )  # fmt: skip
    result["name"] = name or os.path.basename(checkpoint.rstrip("/"))
    said = say(result, eval_text, json)
    if out:
        try:
            write_json(out, result)
        except UserError:
            print(said)  # it has taken long
            raise
    _raise_failed(result, said, out)
    return said


def _raise_failed(result: dict[str, Any], said: str, out: str) -> None:
    """Prints a result of which a part failed, and raises UserError or Fault for that part."""
    failed = [entry for point in result.get("by_alpha", [result]) for entry in point.get("failed", {}).items()]
    if failed:
        print(said)
        parts = "; ".join(f"{part}: {why['line']}" for part, why in failed)
        kind = UserError if all(why["mistake"] for _, why in failed) else Fault
        raise kind(f"eval: {parts} (all else is scored{', and in ' + out if out else ''})")


def report(*runs: str, out: str, json: bool = False) -> str:
    """Makes a table and a plot of runs (their curves) and of files that `eval --out` wrote (their scores).

    Example: grow report base.json sft.json runs/sft --out results

    Args:
        runs: Training runs, and files of scores.
        out: The folder for report.md and report.png.
        json: Print one JSON object.
    """
    from grow.analysis.report import report as run

    if not runs:
        raise UserError("report: name at least one run, or a file that `eval --out` wrote")
    if runs[0].endswith(".jsonl"):
        return _report_study(runs, out, json)
    result = run(runs, out)
    return say(result, lambda r: f"{r['text']}\nwritten: {', '.join([r['table'], *r['plots']])}", json)


def _report_study(runs: tuple[str, ...], out: str, json: bool) -> str:
    """Makes the report of a study, under its old command: it stands with the study now."""
    script = Path(__file__).parents[2] / "recipes" / "study" / "report.py"
    command = [str(script), *runs, "--out", out, *(["--json"] if json else [])]
    print(f"grow: the report of a study is made by: python {' '.join(command)}", file=sys.stderr)
    if not script.is_file():
        raise UserError(f"report: {script} is not there; it is a part of the repository")
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.rstrip()


def find_alpha(
    checkpoint: str, max_kl: str = "0.01", text: str = "", passages: str = "32", start: str = "", json: bool = False
) -> str:
    """Finds the largest α that keeps a trained model within a bound of its base, by KL on general text.

    KL(base ‖ model) of the next token, nats, the mean over all positions of the text. Bisection: a few passes over it.

    Example: grow find-alpha ~/models/gemma-3-270m-french-grown --max-kl 0.01 --text prose.txt

    Args:
        checkpoint: A grown checkpoint, or what a run by `adapter` ends in; or, with --start, a stock one.
        max_kl: The bound, in nats a token.
        text: FILE.txt, whose paragraphs are the passages, or FILE.jsonl with a column text; English fiction unless
            given, which recipes/gemma3_270m/fetch.py prose brings.
        passages: How many passages, of 256 tokens at most.
        start: What a stock checkpoint was trained from; its weights are interpolated.
        json: Print one JSON object.
    """
    bound, count = number("--max-kl", max_kl, float), number("--passages", passages)

    if not bound > 0 or count < 1:
        raise UserError(f"find-alpha: --max-kl {max_kl} and --passages {passages}: both are more than 0")

    from grow.evaluation.find_alpha import find_alpha as run

    return say(run(checkpoint, start, text, count, bound), alpha_text, json)


def learn_alphas(
    checkpoint: str, out: str, recipe: str, text: str = "", kl_weight: str = "2", steps: str = "40", json: bool = False,
    **fields: str,
) -> str:  # fmt: skip
    """Learns an interpolation coefficient α for each layer of a grown checkpoint, on held-out rows.

    At α = 1 the new checkpoint has each layer at its own coefficient; at α = 0 it is the base, as before.

    Minimises the task's loss on the recipe's validation rows + kl_weight times KL(base ‖ model) on general text, over
    one number a layer. OUT is the same checkpoint, its shards linked.

    Example: grow learn-alphas GROWN OUT --recipe recipes/gemma3_270m/translation.yaml

    Args:
        checkpoint: A grown checkpoint, trained.
        out: The folder to write.
        recipe: The task.
        text: Folders of general text, with commas, whose split train has a column text; English fiction unless given,
            which recipes/gemma3_270m/fetch.py prose brings.
        kl_weight: The weight of a nat of KL against a nat of the task's loss; a larger one stays nearer to the base.
        steps: The number of steps, each on one sequence of the task and one of general text.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    weight, count = number("--kl-weight", kl_weight, float), number("--steps", steps)
    if not weight > 0 or count < 1:
        raise UserError(f"learn-alphas: --kl-weight {kl_weight} and --steps {steps}: both are more than 0")

    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields)
    folders = text.split(",") if text else [os.path.expandvars("${GROW_CACHE}/gemma3_270m/prose")]

    from grow.evaluation.learn_alphas import learn_alphas as run

    return say(run(checkpoint, out, settings, folders, weight, count), layer_alphas_text, json)


def chat(
    checkpoint: str, prompt: str | None = None, prompts: str = "", recipe: str = "", compare: bool = False,
    switch: str = "auto", max_new_tokens: str = "128", temperature: str = "0", json: bool = False, **fields: str,
) -> str:  # fmt: skip
    """Talks with a model, says whether its skill was on, and with --compare what its base would have written.

    Without --prompt and --prompts it reads prompts from the terminal, a line each. Under a chat template they are one
    conversation.

    Example: grow chat runs/gemma3_270m-translation-g_freeze --recipe recipes/gemma3_270m/translation.yaml --compare
    Example: grow chat ~/models/gemma-3-1b-it-skill --prompt "How do I reset the router?"

    Args:
        checkpoint: A checkpoint, stock or grown, a finished run, or a folder of PEFT's.
        prompt: One prompt; of several lines, in bash: --prompt $'one\ntwo'.
        prompts: A file of prompts, one a line.
        recipe: Put prompts into this recipe's template (of several columns: as a JSON object); the checkpoint's chat
            template unless given or, where it has none, the prompt as it is.
        compare: Also show what the base writes.
        switch: "auto", as it was fitted, "on" or "off".
        max_new_tokens: At most so many tokens are written.
        temperature: 0 takes the likeliest token, above 0 draws.
        json: Print a JSON object for each prompt, a line each.
        fields: Fields of the recipe.
    """
    most, heat = number("--max-new-tokens", max_new_tokens), number("--temperature", temperature, float)
    if most < 1 or heat < 0:
        raise UserError("chat: --max-new-tokens is at least 1, --temperature at least 0")
    if prompt is not None and prompts:
        raise UserError("chat: give --prompt or --prompts")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: is empty")
    lines: Any = [prompt]
    if prompts:
        try:
            lines = Path(prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts {prompts}: cannot be read ({error})") from None
    elif prompt is None:
        if sys.stdin is None:
            raise UserError("chat: there is no input to read prompts from; give --prompt or --prompts")
        lines = _typed()

    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields) if recipe else None

    from grow.data.of_recipe import template_of
    from grow.evaluation.chat import Chat
    from grow.evaluation.of_checkpoint import model_and_tokenizer

    model, tokenizer = model_and_tokenizer(checkpoint, switch, compare)
    talk = Chat(model, tokenizer, template_of(settings) if settings else None, most, heat, compare)
    for line in lines:
        if line.strip():
            answer = talk.ask(line, stream=not json)
            print(say(vars(answer), answer_text, json), flush=True)
    return ""


def _typed() -> Iterator[str]:
    """Yields the lines that are typed, until the end of input."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
