"""The rows of a split in tokens: the usable ones, and what is wrong with the others.

They are tokenised once, by as many processes as there are cores, and kept in the cache of `datasets` as Arrow files
that all ranks map into memory.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate.utils import patch_environment
from filelock import FileLock
from xxhash import xxh3_128

from grow.data.encoder import Encoder
from grow.data.examples import SCHEMA, Examples, lists
from grow.data.images import Images, RowImages, files_digest
from grow.data.rows import Rows
from grow.data.template import Template
from grow.data.text_files import ListRows
from grow.errors import UserError

_FORMAT = 2  # of the cache: raised when the same rows become other tokens
_MANY = 20_000  # rows from which several processes pay off
_AT_A_TIME = 1000


@dataclass
class Encoded:
    """Holds tokenised rows. `bad` has the indices of rows that were left out, by what is wrong with them; `rows` tells
    where an index is in its file."""

    examples: Examples
    bad: dict[str, list[int]]
    rows: Rows

    def check(self, what: str, max_bad_rows: float) -> None:
        """Prints which rows were left out to stderr. Raises UserError if their share is above `max_bad_rows`, or all
        are."""
        count = sum(map(len, self.bad.values()))
        if count:
            total = len(self.examples) + count
            line = f"{what}: {count} of {total} rows cannot be used: {self.reasons()}"
            if count > max_bad_rows * total:
                raise UserError(f"{line}; more than max_bad_rows {max_bad_rows:g}: mend them, or raise max_bad_rows")
            print(line, file=sys.stderr)
        if not self.examples:
            raise UserError(f"{what}: has no row that can be used{': ' + self.reasons() if count else ''}")

    def reasons(self) -> str:
        """Says what is wrong with which rows; the commonest first."""
        kinds = sorted(self.bad.items(), key=lambda item: -len(item[1]))
        said = [f"{len(rows)} {why} (row {self._numbers(rows)})" for why, rows in kinds[:4]]
        place = self.rows.where(kinds[0][1][0]) if kinds else ""
        more = [f"and {len(kinds) - 4} kinds more"] if len(kinds) > 4 else []
        first = [f"the first is in {place.partition(': ')[2]}"] if ": " in place else []
        return "; ".join(said + more + first)

    def _numbers(self, rows: list[int]) -> str:
        return ", ".join(str(self.rows.number(row)) for row in rows[:5]) + (", …" if len(rows) > 5 else "")


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: Any, template: Template, max_length: int = 0, end: bool = True
) -> Encoded:
    """Tokenises rows, in memory. Only text that is to be learnt (and an end token after a completion) has labels.

    Rows of more than `max_length` tokens are bad; 0 takes any. Raises UserError for a template that does not fit.
    """
    kept = rows if isinstance(rows, Rows) else ListRows(rows)
    _check_columns(kept, template)
    encoder = Encoder(tokenizer, template, end)
    parts = [encoder.table(kept[first : first + _AT_A_TIME]) for first in range(0, len(kept), _AT_A_TIME)]
    return _sorted_out(parts, max_length, kept, encoder.images)


def encode_cached(rows: Rows, tokenizer: Any, template: Template, max_length: int, end: bool = True) -> Encoded:
    """Does the same as `encode` for many rows, with several processes, and takes them from the cache the next time.

    The key of the cache is the contents of the rows' files, the template, the tokenizer's files and the libraries'
    versions.
    """
    _check_columns(rows, template)
    encoder = Encoder(tokenizer, template, end)
    return _sorted_out(_cached_parts(rows, encoder), max_length, rows, encoder.images)


def _check_columns(rows: Rows, template: Template) -> None:
    columns = rows.columns(template.columns())
    if columns:  # without any, no row is there or can be read, and that is reported later
        template.check(columns)


def _cached_parts(rows: Rows, encoder: Encoder) -> list[pa.Table]:
    if not len(rows):
        return []
    key = _key(rows, encoder.tokenizer, encoder.template, encoder.end)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "grow" / f"{key}.arrow"
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The first makes it, the others of this machine find it. Processes side by side take a core each.
        with FileLock(path.with_suffix(".lock")), patch_environment(TOKENIZERS_PARALLELISM="false"):
            made = datasets.Dataset.from_dict({"row": np.arange(len(rows))}).map(
                _encode_batch, fn_kwargs={"encoder": encoder, "rows": rows},
                batched=True, batch_size=_AT_A_TIME, remove_columns=["row"], num_proc=_processes(len(rows), encoder),
                features=datasets.Features.from_arrow_schema(SCHEMA), desc="tokenising",
                cache_file_name=str(path), load_from_cache_file=True, new_fingerprint=key,
            )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"{path.parent}: the rows' tokens cannot be kept there ({error.strerror or error}); mend that, or name "
            "another place in HF_DATASETS_CACHE"
        ) from error
    return [pa.Table.from_batches([batch]) for batch in made.data.table.to_batches()]


def _encode_batch(batch: dict[str, list[int]], encoder: Encoder, rows: Rows) -> pa.Table:
    return encoder.table(rows[batch["row"][0] : batch["row"][-1] + 1])


def _processes(count: int, encoder: Encoder) -> int | None:
    cores, many = len(os.sched_getaffinity(0)), _MANY // 100 if encoder.images else _MANY
    return None if count < many or cores < 2 else min(cores, count // (many // 2), 32)


def _key(rows: Rows, tokenizer: Any, template: Template, end: bool) -> str:
    folder = Path(tokenizer.name_or_path)
    digest = xxh3_128()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and "index" not in file.name:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    used = dataclasses.asdict(template)
    if "strftime_now" not in template.chat_template + str(getattr(tokenizer, "chat_template", "")):
        used["day"] = ""
    libraries = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    if template.images:
        used["files"] = files_digest(rows, template.images, Path(template.image_root), changed=True)
    facts = [_FORMAT, rows.checksum(), len(rows), sorted(used.items()), end, digest.hexdigest(), libraries]
    return xxh3_128(repr(facts).encode()).hexdigest()


def _sorted_out(parts: list[pa.Table], max_length: int, rows: Rows, images: Images | None) -> Encoded:
    """Separates usable rows from bad ones."""
    bad: dict[str, list[int]] = {}
    good, done = [np.zeros(0, np.int64)], 0
    for part in parts:
        reasons = part["bad"].to_pylist() if part["bad"].null_count < len(part) else []
        for index, reason in enumerate(reasons):
            if reason is not None:
                bad.setdefault(reason, []).append(done + index)
        sizes = np.diff(lists(part["tokens"])[0])
        too_long = sizes - 1 > (max_length or np.inf)
        for place in np.flatnonzero(too_long):
            bad.setdefault(f"longer than max_length, {max_length} tokens", []).append(done + int(place))
        good.append(np.flatnonzero((sizes > 0) & ~too_long) + done)
        done += len(part)
    of_rows = None if images is None else RowImages(images, rows)
    return Encoded(Examples(parts, np.concatenate(good), of_rows), bad, rows)
