"""What is learnt is what is written: values of every format as they stand in the file, and only the split's files."""

import bz2
import gzip
import json
import lzma
import os
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from grow.data.files import split_files
from grow.data.load import load_rows
from grow.data.rows import _checksum
from grow.data.template import Template
from grow.data.tokens import encode
from grow.errors import UserError


def written(rows: Any, base: Path, template: str = "{v}") -> tuple[list[str], dict[str, list[int]]]:
    """What each usable row is learnt as, and the bad ones."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = encode(rows, tokenizer, Template("", template), end=False)
    return [tokenizer.decode([label for label in e.labels if label >= 0]) for e in encoded.examples], encoded.bad


VALUES = ["1.50", "1e5", "0.1", "-0.0", "18446744073709551616", "true", "null", '"NA"', '"2024-02-30"', "NaN", "[1]",
          '"\\u00e9"', '" x "', '"a\\nb"', '"\\ud83d\\ude00"', '"\\ud83d"']  # fmt: skip


def test_jsonl_values(text_base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n\r\n".join(f'{{"v": {value}}}' for value in VALUES).encode() + b"\n  \n"
    )
    found, bad = written(load_rows(str(tmp_path), "train"), text_base)
    expected = [
        "1.50",
        "1e5",
        "0.1",
        "-0.0",
        "18446744073709551616",
        "true",
        "NA",
        "2024-02-30",
        "é",
        " x ",
        "a\nb",
        "😀",
    ]
    assert found == expected
    assert sorted(row for some in bad.values() for row in some) == [6, 9, 10, 15]
    assert written(load_rows(str(tmp_path), "train[:3]"), text_base, "{v:.1f} EUR")[0] == [
        "1.5 EUR",
        "100000.0 EUR",
        "0.1 EUR",
    ]


def test_csv_cells(text_base: Path, tmp_path: Path) -> None:
    cells = ["007", "1.50", "NA", "true", "null", "2024-01-01", '"two\nlines, and ""quotes"""', "é", "1,000"[:1]]
    (tmp_path / "train.csv").write_bytes(
        "\r\n".join(["v,w", *(f"{cell}," for cell in cells), "short"]).encode("utf-8-sig")
    )
    rows = load_rows(str(tmp_path), "train")
    found, bad = written(rows, text_base, "{v}|{w}")
    assert found == [f"{cell}|" for cell in [*cells[:6], 'two\nlines, and "quotes"', "é", "1"]]
    assert bad == {"1 cells, the header has 2": [9]}
    assert rows.where(9) == "row 9: train.csv, line 12"
    (tmp_path / "test.tsv").write_text("v\tw\na, b\tc\n")
    assert written(load_rows(str(tmp_path), "test"), text_base, "{v}|{w}")[0] == ["a, b|c"]
    (tmp_path / "validation.csv").write_text('v,w\n1,2\n"never closed,3\n4,5\n')
    with pytest.raises(UserError, match=r"validation.csv, line \d: not CSV"):
        load_rows(str(tmp_path), "validation")


def test_parquet_and_arrow_values(text_base: Path, tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "v": pyarrow.array([0.1, 2.5, None], pyarrow.float32()), "day": [date(2024, 2, 29)] * 3,
        "price": [Decimal("1.50")] * 3, "flag": [True, False, True], "big": [2**60] * 3,
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    found, bad = written(load_rows(str(tmp_path), "train"), text_base, "{v} {day} {price} {flag} {big}")
    assert found == [f"0.1 2024-02-29 1.50 true {2**60}", f"2.5 2024-02-29 1.50 false {2**60}"]
    assert bad == {"without a value in a column": [2]}
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"v": ["a", "b"]})}).save_to_disk(tmp_path / "saved")
    assert written(load_rows(str(tmp_path / "saved"), "train"), text_base)[0] == ["a", "b"]


def test_what_datasets_leaves_beside_its_files(text_base: Path, tmp_path: Path) -> None:
    """Rows that were mapped, filtered or shuffled are kept there, under names of their own."""
    import datasets

    datasets.Dataset.from_dict({"v": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved" / "train")
    rows = datasets.load_from_disk(tmp_path / "saved" / "train")
    rows.map(lambda row: {"v": row["v"] * 2}).shuffle(seed=0).filter(lambda row: row["v"] != "aa")
    assert any(file.name.startswith("cache-") for file in (tmp_path / "saved" / "train").iterdir())
    assert written(load_rows(str(tmp_path / "saved"), "train"), text_base)[0] == ["a", "b", "c"]


def test_a_table_that_is_replaced(text_base: Path, tmp_path: Path) -> None:
    """Under the same name and time, as unpacking and copying keep them."""
    path = tmp_path / "train.parquet"
    for value in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"v": [value] * 3}), path)
        os.utime(path, (10**9, 10**9))
        found, _ = written(load_rows(str(tmp_path), "train"), text_base)
        assert found == [value] * 3
        _checksum.cache_clear()  # as in another process


def test_an_object_of_json_is_as_it_stands(text_base: Path, tmp_path: Path) -> None:
    """A key twice is nobody's value; -0 is -0; a file of which no line can be read says why, and not what it lacks."""
    (tmp_path / "train.jsonl").write_text('{"v": 1, "v": 2}\n{"v": -0}\n{"v": 1E400}\n{"v": {"w": 1, "w": 1}}')
    found, bad = written(load_rows(str(tmp_path), "train"), text_base)
    assert found == ["-0", "1E400"] and sorted(bad.values()) == [[0], [3]]
    assert list(bad) == ["the key v stands in an object twice", "the key w stands in an object twice"]
    (tmp_path / "test.json").write_text('[{"v": 1, "v": 2}]')
    with pytest.raises(UserError, match=r"test.json: the key v stands"):
        load_rows(str(tmp_path), "test")
    (tmp_path / "validation.jsonl").write_text("{'v': 1}\n{'v': 2}\n")
    with pytest.raises(UserError, match=r"has no row that can be used: 2 not JSON .*in validation.jsonl, line 1"):
        encode(load_rows(str(tmp_path), "validation"), AutoTokenizer.from_pretrained(text_base), Template("", "{v}")
               ).check("v", 1)  # fmt: skip


def test_typed_objects_have_what_their_row_has(text_base: Path, tmp_path: Path) -> None:
    """Names that only other rows have are not there, numbers inside are written shortest, NaN is no value; a part of a
    split may be empty."""
    rows = [{"f": 0.1, "calls": [{"a": 1, "b": None}], "n": float("nan")}, {"f": 0.2, "calls": [{"a": None, "b": "x"}]}]
    kind = pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.string()})
    schema = pyarrow.schema({"v": pyarrow.struct({"f": pyarrow.float32(), "calls": pyarrow.list_(kind),
                                                  "n": pyarrow.float64()})})  # fmt: skip
    for part, some in enumerate((rows, [])):
        table = pyarrow.Table.from_pylist([{"v": row} for row in some], schema)
        pyarrow.parquet.write_table(table, tmp_path / f"train-{part}-of-2.parquet")
    found = load_rows(str(tmp_path), "train")
    assert [row["v"]["calls"] for row in found] == [[{"a": 1}], [{"b": "x"}]]
    assert written(found, text_base, "{v[f]}")[0] == ["0.1", "0.2"]
    assert list(written(found, text_base, "{v[n]}")[1]) == ["without a value at v[n]"]


@pytest.mark.parametrize("end", ["gz", "GZ", "zst", "xz", "bz2", "lz4"])
def test_what_is_packed_is_read_anew_and_whole(end: str, text_base: Path, tmp_path: Path) -> None:
    """Of several members all; of a file that was replaced what is in it now; of one that was cut short nothing."""
    file = tmp_path / f"train.jsonl.{end}"
    kinds = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    pack = kinds.get(end.lower()) or (
        lambda text: pyarrow.Codec({"zst": "zstd"}.get(end, end)).compress(text, asbytes=True)
    )
    file.write_bytes(pack(b'{"v": "old"}\n'))
    assert written(load_rows(str(tmp_path), "train"), text_base)[0] == ["old"]
    whole = pack(b'{"v": "new"}\n') + pack(b'{"v": "and more"}\n')
    file.write_bytes(whole)
    assert written(load_rows(str(tmp_path), "train"), text_base)[0] == ["new", "and more"]
    file.write_bytes(whole[:-6])
    with pytest.raises(UserError, match="cannot be read: "):
        load_rows(str(tmp_path), "train")


def test_folders_that_links_lead_to(text_base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ROWS.JSONL").write_text('{"v": 1}')
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    for split in ("train", "test"):
        assert len(load_rows(str(tmp_path / "linked"), split)) == 1


def test_other_ways_to_lie(text_base: Path, tmp_path: Path) -> None:
    """A list in a .json, a compressed file, one file alone, parts that do not have the same columns, plain lines."""
    (tmp_path / "validation.json").write_text('[{"v": 1.50},\n {"v": "x", "w": {}}, 3]')
    found, bad = written(load_rows(str(tmp_path), "validation"), text_base)
    assert found == ["1.50", "x"] and bad == {"not a JSON object": [2]}
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"v": "packed"}\n'))
    assert written(load_rows(str(tmp_path), "test"), text_base)[0] == ["packed"]
    for number, row in enumerate([{"v": 1}, {"v": "b", "extra": [1]}]):
        (tmp_path / f"train-0000{number}-of-00002.jsonl").write_text(json.dumps(row))
    assert written(load_rows(str(tmp_path), "train"), text_base)[0] == ["1", "b"]
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(f'{{"v": {n}}}\n' for n in range(10)))
    assert written(load_rows(str(alone), "train[80%:]+train[:1]"), text_base)[0] == ["8", "9", "0"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("one\ntwo\n")
    assert written(load_rows(str(tmp_path / "lines"), "train"), text_base, "{text}")[0] == ["one", "two"]
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cannot be read: "):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.jsonl", "train_v1.jsonl", "old/train.jsonl", "train copy.jsonl"], "train", ["train.jsonl"]),
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "stats.json"], "train",
         ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["dev.csv", "train.csv", "test.csv"], "validation", ["dev.csv"]),
        (["questions.train.jsonl", "questions.test.jsonl"], "test", ["questions.test.jsonl"]),
        (["alpaca.json", "LICENSE.txt~", "picture.png"], "train", ["alpaca.json"]),
        ([".ipynb_checkpoints/train.jsonl", "__MACOSX/train.jsonl", "rows/train/a.jsonl"], "train",
         ["rows/train/a.jsonl"]),
        (["a/train-1-of-1.csv", "b/train-1-of-2.csv", "b/train-2-of-2.csv"], "train",
         ["a/train-1-of-1.csv", "b/train-1-of-2.csv", "b/train-2-of-2.csv"]),
        (["test/part.arrow", "test.lock", "train/part.arrow"], "test", ["test/part.arrow"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(names: list[str], split: str, found: list[str]) -> None:
    assert split_files(names, Path, split, None, None, "here") == found


@pytest.mark.parametrize(
    ("configs", "split", "config", "found"),
    [
        ("{data_files: 'x-[0-9].csv'}", "train", None, ["x-1.csv", "x-2.csv"]),
        ("{data_files: 'x-[!0-9].csv'}", "train", None, ["x-a.csv"]),
        ("{data_files: x-1.csv}", "train", None, ["x-1.csv"]),
        ("[{config_name: en, data_dir: en}, {config_name: fr, data_dir: ./fr/}]", "train", "fr", ["fr/0.parquet"]),
        ("[{config_name: en, data_dir: en}, {data_files: x-1.csv}]", "validation", "en", ["en/dev.csv"]),
        ("[{config_name: a, data_files: x-1.csv}, {config_name: 7, default: true, data_files: {train: [x-2.csv]}}]",
         "train", None, ["x-2.csv"]),
        ("[{data_files: [{split: train, path: '**/*.parquet'}]}]", "train", None, ["fr/0.parquet"]),
    ],
)  # fmt: skip
def test_what_a_card_says(configs: str, split: str, config: str | None, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"\ufeff---\nconfigs: {configs}\n---\n")
    names = ["README.md", "x-1.csv", "x-2.csv", "x-a.csv", "en/train.csv", "en/dev.csv", "fr/0.parquet", "train.csv"]
    assert split_files(names, tmp_path.joinpath, split, None, config, "here") == found
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n\tdata_files: x-1.csv\n---\n")
    with pytest.raises(UserError, match="its card is not YAML"):
        split_files(names, tmp_path.joinpath, split, None, config, "here")


@pytest.mark.parametrize(
    ("names", "split", "says"),
    [
        (["a/train-1-of-1.csv", "b/train-1-of-2.csv"], "train", "1 of the 2 parts of b/train"),
        (["train.jsonl", "train.jsonl.gz"], "train", "train.jsonl is there twice"),
        (["train.csv", "train.jsonl"], "train", "several formats: train.csv, train.jsonl"),
        (["train.jsonl"], "validation", "no file in it holds its split validation .there are: train.jsonl"),
        (["notes.md"], "train", "no file of rows"),
        (["train-1-of-3.csv", "train-3-of-3.csv"], "train", "2 of the 3 parts"),
    ],
)
def test_a_split_that_is_not_plain(names: list[str], split: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split_files(names, Path, split, None, None, "here")


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{a[b][0]}", {"a": {"b": ["x"]}}, "x"),
        ("{a.b}", {"a.b": "dotted"}, "dotted"),
        ("{first name}", {"first name": "Ada"}, "Ada"),
        ("{0}", {"0": "zero"}, "zero"),
        ("{{{a}}} $HOME ~ {a:>3}", {"a": "x"}, "{x} $HOME ~   x"),
        ("{a!r}", {"a": "x"}, "'x'"),
    ],
)
def test_a_template_takes_what_a_row_has(template: str, row: dict[str, Any], text: str) -> None:
    assert Template().fill(template, row) == text
    Template("", template).check(list(row))


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("{a[b]}", {"a": {"b": None}}, r"without a value at a\[b\]"),
        ("{a[b]}", {"a": {}}, r"without a value at a\[b\]"),
        ("{a[9]}", {"a": [1]}, r"without a value at a\[9\]"),
        ("{a[b]}", {"a": "text"}, r"without a value at a\[b\]"),
        ("{a}", {}, "without a value in a column"),
        ("{a}", {"a": {"b": 1}}, "a dict, not a text, at a"),
        ("{a}", {"a": ["x"]}, "a list, not a text, at a"),
        ("{a:.2f}", {"a": "dear"}, "does not take the format"),
        ("{a}", {"a": "\udc00"}, "surrogate"),
    ],
)
def test_a_row_that_cannot_fill_it_is_bad(template: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Template().fill(template, row)


@pytest.mark.parametrize("template", ["{a.b}", "{a", "}", "{missing}"])
def test_a_template_that_no_row_can_fill(template: str) -> None:
    with pytest.raises(UserError):
        Template("", template).check(["a"])


def test_rows_of_ones_choice_are_those(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"v": {n}}}\n' for n in range(2500)))
    rows = load_rows(str(tmp_path), "train")
    assert [row["v"] for row in rows] == list(range(2500)) and [row["v"] for row in rows[1998:2003]] == [
        *range(1998, 2003)
    ]
    chosen = rows.select(np.array([7, 3, 2499])).select([2, 0])
    assert [row["v"] for row in chosen] == [2499, 7] and chosen.number(0) == 2499
    assert rows[-1]["v"] == 2499 and rows.checksum() != chosen.checksum()
