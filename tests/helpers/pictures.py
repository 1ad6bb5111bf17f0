"""Rows with small pictures, drawn here: which colour is it? And some without one beside them."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": "r", "green": "g", "blue": "b", "black": "k"}


def make_pictures(path: Path) -> Path:
    """A folder of rows {"question", "answer", "picture"}, the last a path, or nothing in every fourth row."""
    path.mkdir(parents=True)
    chosen = random.Random(0)
    for split, count in {"train": 48, "validation": 8, "test": 12}.items():
        rows: list[dict[str, Any]] = []
        for index in range(count):
            colour = chosen.choice(list(COLOURS))
            name = f"{split}-{index}.png"
            picture = Image.new("RGB", (20 + index % 5, 16), colour)
            picture.putpixel((index % 20, index % 16), (index, 7, len(split)))  # no two are alike
            picture.save(path / name)
            rows.append({"question": "?", "answer": COLOURS[colour], "picture": name})
            if index % 3 == 2:
                rows.append({"question": f"{index}+1=", "answer": str(index + 1), "picture": None})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_kept(path: Path) -> Path:
    """Held-out rows of another kind, with pictures and of text alone: is it dark, and what comes before?"""
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for index in range(6):
        Image.new("RGB", (16, 20), (40 * index, 40 * index, 30)).save(path / f"{index}.png")
        rows.append({"question": "dark?", "answer": "yn"[index > 2], "picture": f"{index}.png"})
    rows += [{"question": f"before {number}:", "answer": str(number - 1), "picture": None} for number in (5, 8, 9)]
    (path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FIELDS = {"images": "picture", "prompt": "{question}", "completion": "{answer}", "max_length": 32}
"""Of a recipe for these rows."""
