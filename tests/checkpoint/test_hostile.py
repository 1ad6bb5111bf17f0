"""A checkpoint is what someone downloaded: whatever is in it, one line is the worst that comes of it."""

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.shards import INDEX_NAME
from grow.checkpoint.verify import verify
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError, one_line
from tests.cli.test_command_line import mistake
from tests.helpers.broken import BROKEN, BROKEN_GROWTH, GROWTH_SHARD, SHARD
from tests.helpers.checkpoints import join_file, reseal, write_base
from tests.helpers.tiny import folder_checksums


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what a small checkpoint costs."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_base_is_refused(kind: str, tmp_path: Path) -> None:
    broken, message = BROKEN[kind]
    source = write_base(tmp_path / "base")
    broken(source)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        expand(str(source), str(tmp_path / "out"))
    assert "\n" not in one_line(raised.value)
    assert files_of(tmp_path) == before, "nothing is left behind, and the source is as it was"


def files_of(folder: Path) -> dict[str, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize("kind", ["an index up the tree", "a line end in a name"])
def test_through_the_command_line(kind: str, tmp_path: Path) -> None:
    BROKEN[kind][0](write_base(tmp_path / "base"))
    mistake("expand", tmp_path / "base", tmp_path / "out")


def test_names_cannot_speak_to_the_terminal() -> None:
    assert one_line(UserError("a\nb\x1b[2J\ud800 é α")) == "a\\nb\\x1b[2J\\ud800 é α"


def test_a_factor_beyond_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most"):
        expand(str(write_base(tmp_path / "base")), str(tmp_path / "out"), factor=10**9)


@pytest.mark.parametrize(
    "front",
    [
        "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)) + "license: *a9\n",
        "license: " + "[" * 3000 + "\n", 'license: "\\uD800"\n', "license: 2020-99-99\n", "license: {a: b}\n", "? {}\n",
    ],
)  # fmt: skip
def test_cards_that_are_traps(front: str, tmp_path: Path) -> None:
    source = write_base(tmp_path / "base")
    (source / "README.md").write_text(f"---\n{front}---\nA base.\n")
    expand(str(source), str(tmp_path / "out"))
    assert "base_model: base" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def grown(tmp_path: Path, unsynced: None) -> Path:
    """A grown checkpoint; beside it its base, and its growth package."""
    expand(str(write_base(tmp_path / "base")), str(tmp_path / "grown"))
    extract_growth(str(tmp_path / "grown"), str(tmp_path / "package"))
    return tmp_path / "grown"


Command = Callable[[Path, str], object]
COMMANDS: dict[str, list[Command]] = {
    "base": [lambda at, out: expand(f"{at}/base", out), lambda at, out: verify(f"{at}/base")],
    "grown": [
        lambda at, out: verify(f"{at}/grown"),
        lambda at, out: verify(f"{at}/grown", f"{at}/base"),
        lambda at, out: consolidate(f"{at}/grown", out),
        lambda at, out: consolidate(f"{at}/grown", out, uniform=True, alpha=0.5, dtype="float32"),
        lambda at, out: consolidate(f"{at}/grown", out, format="grown"),
        lambda at, out: extract_base(f"{at}/grown", out),
        lambda at, out: extract_growth(f"{at}/grown", out),
    ],
    "package": [lambda at, out: attach_growth(f"{at}/base", f"{at}/package", out)],
}  # fmt: skip


def refusals(commands: list[Command], at: Path) -> list[str]:
    """Runs commands on what is in a folder. Returns what they say of mistakes; any other exception comes through."""
    said = []
    for command in commands:
        before = files_of(at)
        try:
            command(at, str(at / "out"))
        except UserError as error:
            said.append(str(error))
            assert not (at / "out").exists()
        shutil.rmtree(at / "out", ignore_errors=True)
        for left in at.glob("out.partial*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        assert files_of(at) == before, "something beside OUT was written"
    return said


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", BROKEN_GROWTH)
def test_a_broken_grown_checkpoint_is_refused(kind: str, sealed: bool, grown: Path) -> None:
    broken, message = BROKEN_GROWTH[kind]
    broken(grown)
    if sealed:
        reseal(grown)
    said = refusals(COMMANDS["grown"], grown.parent)
    with pytest.raises(UserError, match=message):
        consolidate(str(grown), str(grown.parent / "out"))
    assert len(said) >= 4


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a\0b", 1, ""])
def test_a_package_that_names_files_elsewhere(name: Any, grown: Path) -> None:
    package = grown.parent / "package"
    facts = json.loads((package / "growth.json").read_text())
    facts["base"]["files"][str(name)] = {"name": name, "bytes": 1, "sha256": "0"}
    (package / "growth.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"growth\.json"):
        attach_growth(str(grown.parent / "base"), str(package), str(grown.parent / "out"))


def test_what_lies_in_the_way_is_not_written_over(grown: Path) -> None:
    """A file in base/ with the name of a shard would be copied over the shard, which is the source's own file."""
    (grown / "base" / SHARD).write_text("not a shard")
    assert any("File exists" in line for line in refusals(COMMANDS["grown"], grown.parent))


def test_a_folder_or_a_pipe_among_the_small_files(grown: Path) -> None:
    os.mkfifo(grown / "base" / "pipe")
    assert sum("not a file" in line for line in refusals(COMMANDS["grown"], grown.parent)) == 2
    (grown / "base" / "pipe").unlink()
    (grown / "base" / "pipe").mkdir()
    assert sum("not a file" in line for line in refusals(COMMANDS["grown"], grown.parent)) == 2


class Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.target),)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_pickle_that_runs_code_does_not(name: str, tmp_path: Path) -> None:
    zero, target = tmp_path / "zero", tmp_path / "created"
    zero.mkdir()
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(
            {"module": {}, "optimizer_state_dict": {}} | ({"a": Malice(target)} if file == name else {}), zero / file
        )
    with pytest.raises(UserError, match="not a sound DeepSpeed"):
        ZeroCheckpoint(zero)
    assert not target.exists()
    torch.load(zero / name, weights_only=False)
    assert target.exists(), "it would have"


@pytest.mark.parametrize("latest", ["", "..", "/etc", "a/b", "\0", b"\xff".decode("latin-1")])
def test_latest_leads_nowhere_else(latest: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(latest, encoding="latin-1")
    with pytest.raises(UserError):
        ZeroCheckpoint(tmp_path)


def test_tensors_that_are_no_vectors(tmp_path: Path) -> None:
    shapes, matrix = [{"model.a": torch.Size([2, 3])}], torch.zeros(6, 2)
    for flat in (matrix, matrix[:1], torch.zeros(()), matrix.to_sparse(), matrix[:, 0].to("meta"), 1, "x"):
        state = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
        torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
        with pytest.raises(UserError):
            ZeroCheckpoint(tmp_path)


def test_made_by_hand_is_sound(grown: Path) -> None:
    """Else all of the above proves nothing."""
    assert all(refusals(commands, grown.parent) == [] for commands in COMMANDS.values())
    assert verify(str(grown), str(grown.parent / "base"))["problems"] == []
    assert folder_checksums(grown).keys() >= {"growth.json", "base/config.json", GROWTH_SHARD}


NASTY = ["", "..", "../x", "/etc/passwd", "\0", "\ud800", "a\nb", "BF16", "F32", SHARD, "config.json", 10**9, -1, 2**64]
VALUES = st.recursive(
    st.sampled_from([None, True, *NASTY]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TARGETS = {
    "base": [SHARD, INDEX_NAME, "config.json", "README.md"],
    "grown": [GROWTH_SHARD, SHARD, INDEX_NAME, "config.json", "growth.json", "base/config.json"],
    "package": [GROWTH_SHARD, "growth.json"],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a JSON value."""
    found = [path] if path else []
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(child, (*path, key))
    return found


def mutated(draw: Callable[[Any], Any], value: Any) -> Any:
    """A JSON value with something replaced, removed, renamed, or taken from elsewhere in it."""
    for _ in range(draw(st.integers(1, 3))):
        every = places(value)
        if not every:
            break
        *way, last = draw(st.sampled_from(every))
        at = reduce(lambda inner, key: inner[key], way, value)
        what = draw(st.sampled_from(["replace", "remove", "rename", "copy"]))
        if what == "replace":
            at[last] = draw(VALUES)
        elif what == "copy":
            at[last] = deepcopy(reduce(lambda inner, key: inner[key], draw(st.sampled_from(every)), value))
        else:
            removed = at.pop(last)
            if what == "rename" and isinstance(at, dict):
                at[str(draw(st.sampled_from(NASTY) | st.text(max_size=5)))] = removed
    return value


def mutate(draw: Callable[[Any], Any], file: Path) -> None:
    data = file.read_bytes()
    file.unlink()  # it may be a link to the template's
    if draw(st.booleans()) or file.suffix == ".md":
        begin = draw(st.integers(0, min(len(data), 600)))
        file.write_bytes(data[:begin] + draw(st.binary(max_size=4)) + data[begin + draw(st.integers(0, 4)) :])
    elif file.suffix == ".json":
        file.write_text(json.dumps(mutated(draw, json.loads(data))))
    else:
        length = struct.unpack("<Q", data[:8])[0]
        join_file(file, mutated(draw, json.loads(data[8 : 8 + length])), data[8 + length :])


def fuzz(folder: Path, examples: int) -> None:
    """Mutates one file of a base, a grown checkpoint or a growth package, and does with it all that can be done."""
    template, work, refused = folder / "template", folder / "work", Counter[str]()
    expand(str(write_base(template / "base")), str(template / "grown"))
    extract_growth(str(template / "grown"), str(template / "package"))

    @settings(max_examples=examples, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))
    @seed(0)
    @given(st.data(), st.sampled_from(sorted(TARGETS)), st.booleans())
    def attempt(data: st.DataObject, kind: str, sealed: bool) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work)
        mutate(data.draw, work / kind / data.draw(st.sampled_from(TARGETS[kind])))
        if kind == "grown" and sealed:
            with suppress(ValueError, TypeError, AttributeError):
                reseal(work / "grown")
        command = data.draw(st.sampled_from(COMMANDS[kind]))
        refused[kind] += bool(refusals([command], work))
        refused["all"] += 1

    attempt()
    print(f"mutations, and how many of each kind were refused: {dict(refused)}")
    assert refused["all"] >= examples and all(refused[kind] > examples // 20 for kind in TARGETS)


@pytest.mark.usefixtures("unsynced")
def test_fuzz(tmp_path: Path) -> None:
    fuzz(tmp_path, 300)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("unsynced")
def test_fuzz_at_length(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000)
