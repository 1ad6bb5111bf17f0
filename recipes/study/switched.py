"""The part of a study's cell that has to do with switches: the skill as it is used, on where its switch opens.

A switch reads the base alone, so one fit serves all cells that let training change the same layers.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import grow
from grid import Cell

from grow.checkpoint.shards import read_json
from grow.checkpoint.switch_record import switch_file
from grow.errors import UserError
from grow.evaluation.bootstrap import interval
from grow.evaluation.evaluate import known_sets

if TYPE_CHECKING:
    from run import Study


def put(study: "Study", cell: Cell, run: Path, kind: str) -> None:
    """Puts a switch of a kind into the folder of a cell's run, fitted if no cell has needed it yet."""
    where = cell.layers or cell.fields.get("lora_layers", "upper")
    names = ["switch", kind, "growth" if cell.layers else cell.method, where, *cell.attention.split()]
    fitted = study.folder(" ".join(names).replace("/", "_"))
    with study.lock(fitted.name):
        if not switch_file(fitted).exists():
            growth = {"layers": where, "attention": cell.attention} if cell.layers else {"lora_layers": where}
            options = study.fields(**cell.fields | growth)
            grow(
                "fit-switch", study.recipe, *options, f"--method={cell.method}", f"--kind={kind}",
                f"--output_dir={fitted}", "--grown=",
            )  # fmt: skip
    switch_file(run).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(switch_file(fitted), switch_file(run))


def scores(study: "Study", cell: Cell, run: Path, trained: Path) -> dict[str, Any]:
    """Returns a cell's scores with each of its switches, by kind; with two whole models, by "row"."""
    found = {}
    for kind in cell.switches:
        scored, out = trained, study.folder(cell.name, f"-{kind}-scores")
        if kind != cell.switches[0]:
            put(study, cell, run, kind)
            scored = trained.with_name(f"{trained.name}-{kind}")
            if not scored.exists():
                grow("consolidate", run, scored, "--format", "grown")
        study.score(scored, out, f"--against={study.base_scores()}", write=cell.write and kind == cell.switches[0])
        found[kind] = study.point(read_json(out))
        if scored != trained and not study.keep:
            shutil.rmtree(scored)
    if cell.two_models:
        decided = study.folder(cell.two_models, "-row-scores")
        if not decided.exists():
            raise UserError(f"{cell.name}: {cell.two_models} decides between the two models; run that first")
        own = read_json(study.folder(cell.name, "-scores"))
        found["row"] = study.point(chosen(own, read_json(study.base_scores()), read_json(decided)))
    return found


def chosen(own: dict[str, Any], base: dict[str, Any], decided: dict[str, Any]) -> dict[str, Any]:
    """Returns the scores of two whole models, of which each row is one's: the trained one's where `decided` opened."""
    parts = {"task": (own["task"], base["task"], decided["task"])}
    for name, known in known_sets(own).items():
        parts[name] = known, known_sets(base)[name], known_sets(decided)[name]
    mixed = {name: _mixed(*part) for name, part in parts.items()}
    first = {"retention": mixed["retention"]} if "retention" in mixed else {}
    more = {name: scores for name, scores in mixed.items() if name not in ("task", "retention")}
    return {"alpha": own["alpha"], "task": mixed["task"], **first, "retention_sets": more}


def _mixed(own: dict[str, Any], base: dict[str, Any], decided: dict[str, Any]) -> dict[str, Any]:
    opened = decided["opened_items"]
    items = [a if on else b for on, a, b in zip(opened, own["items"], base["items"], strict=True)]
    kl = [value if on else 0.0 for on, value in zip(opened, own["kl_items"], strict=True)]
    labels = own["label_items"]
    tokens = sum(labels)
    same = [not on or bool(alike) for on, alike in zip(opened, own["identical_items"], strict=True)]
    mixed = {
        "loss": -math.fsum(items) / tokens, "log_likelihood": math.fsum(items) / len(items), "rows": len(items),
        "kl": math.fsum(kl) / tokens, "opened": sum(opened) / len(opened),
        "identical": sum(same) / len(same), "intervals": {"kl": interval(kl, labels)},
    }  # fmt: skip
    if "accuracy_items" in own:
        hits = [a if on else b for on, a, b in zip(opened, own["accuracy_items"], base["accuracy_items"], strict=True)]
        mixed |= {"accuracy": sum(hits) / len(hits)}
    changes = [after - before for after, before in zip(items, base["items"], strict=True)]
    mixed["from_base"] = {
        "log_likelihood": math.fsum(changes) / len(changes), "interval": interval(changes), "rows": len(changes),
    }  # fmt: skip
    return mixed
