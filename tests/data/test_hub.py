"""Models and data from a hub: what prepare.sh fetches is found by every command, with network and without."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from grow.checkpoint.expand import expand
from grow.checkpoint.hub import Choose, Repository
from grow.checkpoint.package import extract_growth
from grow.checkpoint.verify import verify
from grow.data.files import split_files
from tests.checkpoint.test_architectures import make
from tests.checkpoint.test_tower import make_gemma4
from tests.helpers.hub import TOKEN, Hub, serving
from tests.helpers.tiny import ROOT, make_base, make_recipe, make_tokenizer

RECIPES = sorted(path for path in ROOT.glob("recipes/gemma*/*.yaml") if "270m" not in str(path))
# What a template of Gemma's tuned models comes to.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def stand_ins(root: Path) -> None:
    """The models and data sets that the recipes name, small: names, layouts, columns and templates are theirs."""
    kinds = {"gemma-3-1b-pt": "text", "gemma-3-1b-it": "text"}
    kinds |= dict.fromkeys(("gemma-3-4b-pt", "gemma-3-4b-it", "gemma-3-12b-pt", "gemma-3-27b-pt"), "multimodal")
    e2b = make(root / "models/google/gemma-4-E2B/main", "gemma4-e2b")
    make_tokenizer(e2b)
    make_gemma4(root / "models/google/gemma-4-E2B-it/main", clips=True)
    for name, kind in kinds.items():
        folder = make_base(root / "models" / "google" / name / "main", kind)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        for other in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original/params.json"):
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_text("not wanted")
    for name in ("gemma-3-1b-it", "gemma-3-4b-it", "gemma-4-E2B-it"):
        (root / "models/google" / name / "main/chat_template.jinja").write_text(TEMPLATE)
    pairs = [{"translation": {"en": f"We saw {n} boats.", "fr": f"Nous avons vu {n} bateaux."}} for n in range(120)]
    claims = [{"premise": f"{n} is odd.", "hypothesis": f"{n} is a number.", "label": "entails"} for n in range(40)]
    sums = [{"Problem": f"{n} + 1?", "options": f"a ) {n} , b ) {n + 1}", "correct": "b"} for n in range(40)]
    parquet(root, "Helsinki-NLP/opus-100", "en-fr", pairs)
    parquet(root, "Helsinki-NLP/opus-100", "de-en", claims)
    parquet(root, "allenai/scitail", "tsv_format", claims)
    parquet(root, "allenai/math_qa", "default", sums)
    science = [{"support": "" if n % 3 else f"{n} is odd.", "question": f"Is {n} odd?", "correct_answer": "yes"}
               for n in range(40)]  # fmt: skip
    for split in ("train", "validation", "test"):
        write(root / f"datasets/allenai/sciq/main/data/{split}-00000-of-00001.parquet", science)
    chats = [{"messages": [{"role": "user", "content": f"Is {n} even?"}, {"role": "assistant", "content": "No."}]}
             for n in range(2000)]  # fmt: skip
    asked = [{"type": "text", "text": "Is it red?", "index": None}, {"type": "image", "text": None, "index": 0}]
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    pictured = {"images": [{"bytes": file.getvalue(), "path": None}]}
    answer = [{"type": "text", "text": "Yes.", "index": None}]
    pictured["messages"] = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for split in ("train", "test"):
        name = f"datasets/HuggingFaceH4/llava-instruct-mix-vsft/main/data/{split}-00000-of-00001.parquet"
        write(root / name, [pictured] * (20 if split == "train" else 2000))
    ultrachat = root / "datasets/HuggingFaceH4/ultrachat_200k/main"
    files = {"train_sft": "data/train_sft-00000-of-00001.parquet", "test_sft": "data/test_sft-00000-of-00001.parquet"}
    for file in files.values():
        write(ultrachat / file, chats)
    listed = "".join(f"  - split: {split}\n    path: {path[:-25]}*\n" for split, path in files.items())
    (ultrachat / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n# Chats\n"
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def parquet(root: Path, name: str, folder: str, rows: list[dict[str, Any]]) -> None:
    """As the hub converts every data set: a folder a configuration, in it one a split."""
    for split, part in {"train": rows[:-20], "validation": rows[-20:-10], "test": rows[-10:]}.items():
        write(root / "datasets" / name / "refs+convert+parquet" / folder / split / "0000.parquet", part)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    stand_ins(root)
    with serving(Hub(root, gated=("google/gemma-3-1b-pt", "google/gemma-3-1b-it", "google/gemma-3-4b-pt"))) as hub:
        yield hub


def commands(lines: list[list[str | Path]], home: Path, **environment: str) -> list[tuple[int, str]]:
    """Several commands, in one process of its own for the time that imports take: exit code and what was said."""
    script = (
        "import contextlib, io, json, sys\nfrom grow.cli.main import main\nfound = []\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):\n"
        "        code = main(line)\n"
        "    found.append([code, said.getvalue()])\n"
        "print(json.dumps(found))\n"
    )
    variables = {"HF_HOME": str(home / "hf"), "GROW_CACHE": str(home / "grow")} | environment
    plain = json.dumps([[str(word) for word in line] for line in lines])
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script, plain], cwd=home, env=ours | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(code, said) for code, said in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def home(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything that the recipes name has been fetched to."""
    home = tmp_path_factory.mktemp("home")
    for recipe, (code, said) in zip(
        RECIPES, commands([["fetch", recipe] for recipe in RECIPES], home, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN),
        strict=True,
    ):  # fmt: skip
        assert code == 0, f"{recipe}: {said}"
    return home


def test_nothing_is_fetched_but_what_is_needed(hub: Hub, home: Path) -> None:
    files = [name for name in hub.asked if "/resolve/" in name]
    assert any(name.endswith("model.safetensors") for name in files)
    assert any(name.endswith("model-00002-of-00002.safetensors") for name in files)
    unwanted = ("pytorch_model.bin", "consolidated.safetensors", ".gguf", "params.json", "de-en/train/0000.parquet")
    assert not [name for name in files if name.endswith(unwanted)]


@pytest.mark.parametrize("network", ["offline", "online"])
def test_every_recipe_starts_from_what_was_fetched(network: str, hub: Hub, home: Path) -> None:
    """The recipes' files as they are. Online without a token: what is here is not asked for again."""
    environment = {"HF_HUB_OFFLINE": "1"} if network == "offline" else {"HF_ENDPOINT": hub.url}
    lines: list[list[str | Path]] = []
    named = [yaml.safe_load(recipe.read_text()) for recipe in RECIPES]
    places = {own["base"]: own["grown"].replace("${GROW_CACHE}", str(home / "grow")) for own in named if "grown" in own}
    for model, place in places.items():
        lines += [["plan", model]]
        lines += [["expand", model, place]] if network == "offline" else []
    lines += [["train", recipe, "--check"] for recipe in RECIPES]
    asked = len(hub.asked)
    for line, (code, said) in zip(lines, commands(lines, home, **environment), strict=True):
        assert code == 0, f"{line}: {said}"
    assert not [name for name in hub.asked[asked:] if "/resolve/" in name], "nothing is fetched again"


def test_a_gated_model_is_one_line_that_says_where_to_ask(hub: Hub, tmp_path: Path) -> None:
    recipe = ROOT / "recipes/gemma3_1b/translation.yaml"
    wrong = commands([["fetch", recipe]], tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_" + "b" * 34)
    for code, said in wrong:
        assert code == 2 and "accept its licence at https://huggingface.co/google/gemma-3-1b-pt" in said
    ((code, said),) = commands([["expand", "google/gemma-3-1b-pt", "x"]], tmp_path, HF_ENDPOINT=hub.url)
    assert code == 2 and "launch/prepare.sh" in said and not (tmp_path / "x").exists()


def test_revisions_configurations_and_cards(hub: Hub, tmp_path: Path) -> None:
    """JSONL and CSV with a card of two configurations, and a base of a branch."""
    make_base(hub.root / "models/someone/sums/older+one", "text", seed=3)
    make_base(hub.root / "models/someone/sums/main", "text", seed=4)
    top = hub.root / "datasets/someone/rows/v2"
    top.mkdir(parents=True)
    for part in ("a", "b"):
        lines = [json.dumps({"q": f"{part}{n}?", "a": f"00{n}"}) for n in range(4)]
        (top / f"{part}-learn.jsonl").write_text("\n".join(lines))
        (top / f"{part}-hold.csv").write_text("q,a\n" + "".join(f"{part}{n}!,0{n}\n" for n in range(4)))
    configs = "".join(
        f"- config_name: {part}\n  data_files:\n  - split: train\n    path: {part}-learn.jsonl\n  - split: validation\n"
        f"    path: {part}-hold.csv\n  - split: test\n    path:\n    - {part}-hold.csv\n"
        for part in ("a", "b")
    )
    (top / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n")
    fields = {
        "data_revision": "v2",
        "method": "sft",
        "prompt": "{q}",
        "completion": "{a}",
        "base_revision": "older/one",
    }
    recipe = make_recipe(tmp_path / "r.yaml", Path("someone/sums"), Path(), Path("someone/rows"), 2, **fields)
    online: list[list[str | Path]] = [["fetch", recipe], ["fetch", recipe, "--data_config", "b"]]
    (without, said), (code, _) = commands(online, tmp_path, HF_ENDPOINT=hub.url)
    assert (without, code) == (2, 0) and "configurations a, b" in said
    show: list[str | Path] = ["preview", recipe, "--data_config", "b", "--json", "--limit", "0"]
    offline: list[list[str | Path]] = [
        show,
        [*show, "--split", "validation"],
        ["train", recipe, "--data_config", "b", "--check"],
        ["show", recipe, "base"],
        ["preview", recipe, "--data_config", "a"],
    ]
    found = commands(offline, tmp_path, HF_HUB_OFFLINE="1")
    assert [code for code, _ in found] == [0, 0, 0, 0, 2], found
    for (_, said), wanted in zip(found, ["<bos>b1?001<eos>", "<bos>b1!01<eos>"], strict=False):
        assert json.loads(said)["rows"][1]["text"] == wanted
    assert found[3][1].strip() == "someone/sums@older/one"
    assert "not in the Hugging Face cache" in found[4][1]
    ((code, said),) = commands([["plan", "someone/sums@older/one"]], tmp_path, HF_HUB_OFFLINE="1")
    assert code == 0, said


def test_a_cache_of_an_older_version_has_no_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in it may be on the hub all the same: that is for the hub to say."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "datasets--someone--lines"
    for name, text in {"refs/main": "abc", "snapshots/abc/train.jsonl": "{}"}.items():
        (cached / name).parent.mkdir(parents=True)
        (cached / name).write_text(text)
    source = Repository("someone/lines", "dataset")

    def choose(split: str) -> Choose:
        return lambda names, read: split_files(names, read, split, None, None, str(source))

    assert source.cached(choose("train")) == [cached / "snapshots/abc/train.jsonl"]
    assert source.cached(choose("validation")) is None


def test_all_parts_of_a_split_have_to_be_there(hub: Hub, tmp_path: Path) -> None:
    """A download that was cut short is no smaller data set."""
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.parquet", [{"q": "1", "a": "2"}])
    base = hub.root / "models/google/gemma-3-1b-it/main"
    recipe = make_recipe(tmp_path / "r.yaml", base, Path(), tmp_path, 2, method="sft", prompt="{q}", completion="{a}")
    ((code, said),) = commands([["train", recipe, "--check"]], tmp_path)
    assert code == 2 and "2 of the 00003 parts" in said


def test_a_growth_package_from_a_hub(hub: Hub, home: Path, text_base: Path, tmp_path: Path) -> None:
    """Attached by its name: fetched where it is not in the cache, found there without network afterwards."""
    package = hub.root / "models" / "someone" / "sums-growth" / "main"
    (hub.root / "models" / "someone" / "nothing" / "main").mkdir(parents=True)
    (hub.root / "models" / "someone" / "nothing" / "main" / "README.md").write_text("Nothing.\n")
    expand(str(text_base), str(tmp_path / "grown"))
    extract_growth(str(tmp_path / "grown"), str(package))
    online, offline = {"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}
    line: list[str | Path] = ["attach", text_base, "someone/sums-growth"]
    ((code, said),) = commands([[*line, tmp_path / "first"]], tmp_path, **offline)
    assert code == 2 and "someone/sums-growth" in said and said.count("\n") == 1
    assert [code for code, _ in commands([[*line, tmp_path / "first"]], tmp_path, **online)] == [0]
    assert [code for code, _ in commands([[*line, tmp_path / "second"]], tmp_path, **offline)] == [0]
    assert not verify(str(tmp_path / "second"), str(text_base))["problems"]
    ((code, said),) = commands([["attach", text_base, "someone/nothing", tmp_path / "third"]], tmp_path, **online)
    assert code == 2 and "has no growth.json" in said
