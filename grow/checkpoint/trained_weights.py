"""What can be consolidated: a starting checkpoint, and the tensors that training changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from grow.checkpoint.card import base_facts
from grow.checkpoint.copies import expected_growth
from grow.checkpoint.lazy import LazyTensor, mean
from grow.checkpoint.metadata import check_growth
from grow.checkpoint.one_skill import OneSkill, has_skills
from grow.checkpoint.run_folder import (
    MARKER,
    counting_checkpoints,
    step_of,
    steps_in,
    validation_losses,
)
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.starting import check_start, second_head
from grow.checkpoint.switch_record import SwitchRecord, switch_of_run
from grow.checkpoint.writer import equal, file_checksums
from grow.checkpoint.zero import ZeroCheckpoint, is_deepspeed
from grow.errors import UserError
from grow.names import canonical, is_growth, is_trained_up, named_beside, own_name
from grow.plan import GrowthPlan


@dataclass
class TrainedWeights:
    """Holds what training changed in `start`: a grown checkpoint, or the base of plain fine-tuning."""

    start: Checkpoint
    trained: dict[str, LazyTensor] = field(default_factory=dict)  # by name on disk; fp32 master weights, if from a run
    facts: dict[str, Any] = field(default_factory=dict)  # facts of the training
    chat_template: str = ""  # the recipe's own, if it has one
    scores: dict[str, Any] = field(default_factory=dict)  # the scores of `eval`
    identity: list[Any] = field(default_factory=list)  # identifies all files that are read
    config: dict[str, Any] | None = None  # the stock checkpoint's, if the method changes the start's
    run_switch: SwitchRecord | None = None  # a run's own

    @property
    def plan(self) -> GrowthPlan | None:
        """Returns the growth plan; None for plain fine-tuning."""
        return GrowthPlan.from_config(self.start.config)

    def tensor(self, name: str) -> LazyTensor:
        """Returns a tensor as trained; a master weight is in fp32."""
        return self.trained[name] if name in self.trained else self.start.lazy(name)

    def has(self, name: str) -> bool:
        """Says whether there is such a tensor."""
        return name in self.trained or name in self.start.tensors

    def growth(self) -> dict[str, LazyTensor]:
        """Returns all tensors that growth has added, as trained, each in the base's dtype."""
        names = dict.fromkeys([name for name in self.start.tensors if is_growth(name)] + list(self.trained))
        return {name: self.tensor(name).to(self.start.tensors[_own(name)].dtype) for name in names}

    def growth_facts(self) -> dict[str, Any]:
        """Returns the metadata of the growth as it is now (config.json's "growth")."""
        before = self.start.config["growth"]
        trained_up = any(is_trained_up(name) for name in self.growth())
        facts = before | {"trained": self.facts or before["trained"], "trained_up": trained_up}
        facts |= {"switch": self.run_switch.values()} if self.run_switch else {}
        return facts | ({"scores": self.scores} if self.scores else {})

    @property
    def has_switch(self) -> bool:
        """Says whether what was trained has a switch (grow.checkpoint.switch_record)."""
        growth = self.start.config.get("growth") or {}
        return self.run_switch is not None or any(
            "switch" in own for own in (growth, *growth.get("skills", {}).values())
        )

    def base_facts(self) -> dict[str, Any]:
        """Returns the name and the licence of the base."""
        growth = self.start.config.get("growth")
        return growth["base"] if growth else base_facts(self.start)


@dataclass(frozen=True)
class Export:
    """Holds what a method has trained, as tensors of a checkpoint, by their names in memory or on disk.

    `config` replaces the starting checkpoint's config.json where a method changes the model's shape; only then may
    there be tensors that the start does not have.
    """

    tensors: dict[str, LazyTensor]
    config: dict[str, Any] | None = None


ExportFunction = Callable[[dict[str, Any], str, Checkpoint, dict[str, LazyTensor]], Export]
"""Turns a method's own parameters into weights, such as a LoRA merged into those of its layers. Its arguments are the
run's recipe, the dtype that it computed in, the start and the trained tensors (grow.methods.export_trained)."""


def as_trained(recipe: dict[str, Any], dtype: str, start: Checkpoint, trained: dict[str, LazyTensor]) -> Export:
    """Returns the trained tensors unchanged: growth and plain fine-tuning train tensors that the checkpoint has."""
    return Export(trained)


def load_trained(
    path: str, start: str = "", tag: str = "", average: int = 0, export: ExportFunction = as_trained
) -> TrainedWeights:
    """Opens a run, one of a run's checkpoints, any DeepSpeed checkpoint, or a grown checkpoint.

    `start` is the checkpoint that training started from, if no run.json names it or it has moved; with `start`, a stock
    checkpoint counts as trained from it. `tag` names one of several checkpoints in a DeepSpeed folder. `average`
    takes the mean of so many of a run's last checkpoints (latest weight averaging, Kaddour 2022, arXiv 2209.14981); 0
    of as many as its recipe says.
    `export` turns a method's own parameters into weights. Raises UserError for anything else.
    """
    folder = Path(path)
    if average < 0:
        raise UserError(f"--average {average}: 1 or more")
    if (folder / "run.json").exists():
        return _open_mean(folder, average, start, export)
    if average > 1 and folder.exists():
        raise UserError(
            f"--average {average}: means are of a training run's checkpoints, and {folder} is not a run's folder"
        )
    if (folder.parent / "run.json").exists() and folder.name.startswith("checkpoint-"):
        if not (folder / MARKER).exists():
            raise UserError(f"{folder}: the checkpoint is not complete; take another of {folder.parent}")
        return _open_run(folder.parent, folder, start, export)
    if is_deepspeed(folder):
        if not start:
            raise UserError(f"{folder}: name the checkpoint that its training started from: --start CKPT")
        return _open_deepspeed(folder, Checkpoint(start), tag)
    checkpoint = Checkpoint(path)
    if has_skills(checkpoint.config):
        names = ", ".join(checkpoint.config["growth"]["skills"])
        raise UserError(
            f"{folder}: holds several skills ({names}); take one out: grow growth {quote(str(folder))} OUT --name SKILL"
        )
    if tag:
        raise UserError(f"--tag {tag}: tags are for DeepSpeed checkpoints, which {folder} is not")
    if start:
        return match_to_base(
            Checkpoint(start), Export({name: checkpoint.lazy(name) for name in checkpoint.tensors}), checkpoint
        )
    if checkpoint.config.get("growth") is None:
        raise UserError(
            f"{folder}: a stock checkpoint already, which has no growth: nothing to consolidate or to take out "
            "(--start BASE says what it was trained from)"
        )
    _check_grown(checkpoint)
    return TrainedWeights(
        checkpoint, facts=checkpoint.config["growth"]["trained"] or {}, identity=checkpoint.identity()
    )


def load_skills(path: str) -> TrainedWeights:
    """Opens a grown checkpoint with several skills. Raises UserError for growth that is not as its config says."""
    checkpoint = Checkpoint(path)
    for name in checkpoint.config["growth"]["skills"]:
        _check_grown(OneSkill(checkpoint, name))
    return TrainedWeights(checkpoint, identity=checkpoint.identity())


def _check_grown(checkpoint: Checkpoint) -> None:
    """Raises UserError unless the growth in a checkpoint is the one that its config describes."""
    if checkpoint.config.get("growth") is None:
        return
    growth = check_growth(checkpoint.config["growth"], checkpoint.path / "config.json")
    plan = GrowthPlan.from_config({"growth": growth})
    assert plan is not None
    _, problems = expected_growth(checkpoint, plan)
    for problem in problems.values():
        raise UserError(f"{checkpoint.path}: {problem}")


def _open_mean(run: Path, average: int, start: str, export: ExportFunction) -> TrainedWeights:
    """Opens what counts of a run (counting_checkpoints): one checkpoint; or the newest of several, with the mean of all
    in the place of its own tensors."""
    paths = counting_checkpoints(run, average)
    source = _open_run(run, paths[0], start, export)
    if len(paths) == 1:
        return source
    others = [_open_run(run, path, start, export) for path in paths[1:]]
    source.trained = {
        name: mean(tensor, *(other.tensor(name) for other in others)) for name, tensor in source.trained.items()
    }
    source.facts["averaged_steps"] = sorted(step_of(path) for path in paths)
    source.identity += [other.identity for other in others]
    return source


def _open_run(run: Path, zero_path: Path, start: str, export: ExportFunction) -> TrainedWeights:
    try:
        run_facts, step = read_json(run / "run.json"), step_of(zero_path)
        step = step if step >= 0 else steps_in(zero_path)  # someone's copy, checkpoint-2-keep
        recipe = run_facts["recipe"]
        facts = {key: recipe[key] for key in ("method", "data")} | {
            "steps": step,
            "learning_rate": recipe["learning_rate"],
            "seed": recipe["seed"],
            "validation_loss": [loss for _, loss in validation_losses(zero_path)],
        }
        dtype = str(run_facts["dtype"])
        moved, start = start, start or str(run_facts["start"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run}: its run.json or trainer_state.json is not what a run writes ({error!r})") from error
    own = _started_from(run, start, bool(moved), run_facts)
    source = _open_deepspeed(zero_path, own, "", lambda trained: export(recipe, dtype, own, trained))
    source.facts, source.chat_template = facts, str(run_facts.get("chat_template") or "")
    source.run_switch = switch_of_run(run)
    if source.run_switch is not None:
        source.identity.append(source.run_switch.values())
    return source


def _started_from(run: Path, start: str, moved: bool, run_facts: dict[str, Any]) -> Checkpoint:
    """Opens the checkpoint that a run started from. If it has moved, its checksums show that it is the same."""
    try:
        own = Checkpoint(start)
    except UserError as error:
        hint = "" if moved else f" ({run} started from it; --start says where it is now)"
        raise UserError(f"{error}{hint}") from None
    if moved and isinstance(run_facts.get("start_checksums"), dict):
        for name, checksum in run_facts["start_checksums"].items():
            if own.path / name not in own.shards or file_checksums(own.path / name)[0] != checksum:
                raise UserError(f"{own.path}: is not what {run} started from: its {name} has other contents")
    return own


def _open_deepspeed(
    path: Path, start: Checkpoint, tag: str, export: Callable[[dict[str, LazyTensor]], Export] = Export
) -> TrainedWeights:
    zero = ZeroCheckpoint(path, tag)
    source = match_to_base(start, export(zero.trained), zero)
    source.facts = {"checkpoint": path.name}
    on_disk = {canonical(name): name for name in start.tensors}
    for name, tensor in zero.frozen.items():
        key = on_disk.get(canonical(name))
        if key and _differs(start, key, tensor):
            raise UserError(f"{path}: {name} was frozen, and is not that of {start.path}: training started elsewhere")
    return source


def match_to_base(start: Checkpoint, export: Export, origin: Any) -> TrainedWeights:
    """Finds each trained tensor's counterpart: names differ between disk and memory, and so do layouts."""
    _check_grown(start)
    on_disk = {canonical(name): name for name in start.tensors}
    found: dict[str, LazyTensor] = {}
    for name, tensor in export.tensors.items():
        key = on_disk.get(canonical(name))
        if key is None and name.endswith("lm_head.weight"):
            continue  # tied: the embedding's second name, which DeepSpeed's universal checkpoints keep
        if key is None and is_trained_up(name):
            # A g_train run starts without it: it has the name and the shape of the base's own.
            own = on_disk.get(canonical(_own(name)), "")
            key = named_beside(name, own) or None
        if key is None and export.config is not None:
            found[name] = tensor
            continue
        if key is None or start.tensors[_own(key)].shape != tensor.shape:
            raise UserError(
                f"{origin.path}: {name} {list(tensor.shape)} has no counterpart in {start.path}; was that replaced?"
            )
        found[key] = tensor
    names = second_head(start)
    if names is not None and names[1] in found:
        check_start(start)
        found[names[0]] = found[names[1]]  # the embeddings' second name
    if GrowthPlan.from_config(start.config) is not None:
        found = {key: tensor for key, tensor in found.items() if is_growth(key) or _differs(start, key, tensor)}
        strange = [key for key in found if not is_growth(key)]
        if strange:
            raise UserError(f"{origin.path}: {strange[0]} was trained as well, which growth leaves as it is")
    return TrainedWeights(start, found, identity=[start.identity(), origin.identity()], config=export.config)


def _own(name: str) -> str:
    """Returns the name of the base's tensor that a trained up-projection replaces, of the same shape and dtype; else
    `name`."""
    return own_name(name) if is_trained_up(name) else name


def _differs(start: Checkpoint, key: str, tensor: LazyTensor) -> bool:
    own = start.lazy(key)
    return own.shape != tensor.shape or not equal(own, tensor.to(own.dtype))
