"""Rows with images: as the checkpoint's own processor makes them, beside rows of text, and a run that learns them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from grow.checkpoint.package import attach_growth, extract_base
from grow.checkpoint.verify import verify
from grow.data import processor
from grow.data.encoder import Encoder
from grow.data.labels import IGNORED
from grow.data.of_recipe import read_sequences, rows_of, tokenizer_of
from grow.data.packing import collate
from grow.data.processor import processor_of_images
from grow.data.template import Template
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.evaluation.evaluate import evaluate
from grow.methods import read_recipe
from grow.model.loading import load
from grow.model.loss import labelled_logits
from tests.checkpoint.test_tower import base_of, logits
from tests.helpers.pictures import FIELDS, make_kept, make_pictures
from tests.helpers.running import consolidate, here, start, train_and_resume
from tests.helpers.tiny import folder_checksums, make_base, make_recipe, run

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
LENGTH = {"gemma3": 32, "gemma4": 96, "vit": 32}
"""Of a sequence with an image's 4 or 16 tokens, or 70 at most."""
PLACE = {"gemma3": "<boi>", "gemma4": "<img>"}
"""What a processor takes for an image's place."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("images") / "base", "multimodal")


@pytest.fixture(scope="module")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("gemma4", "gemma4-clips", "vit")
    others = {kind: base_of(tmp_path_factory.mktemp("images") / kind, kind) for kind in kinds}
    tokenizer = AutoTokenizer.from_pretrained(others["vit"], extra_special_tokens={"image_token": "<img>"})
    how = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    of_images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(of_images, tokenizer, image_token="<img>", **how).save_pretrained(others["vit"])
    return {"gemma3": base, **others}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images") / "rows")


def recipe_of(folder: Path, base: Path, pictures: Path, stage: int = 1, **fields: Any) -> Path:
    return make_recipe(folder / "r.yaml", base, folder / "run" / "grown", pictures, stage, **(FIELDS | fields))


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4-clips"])
def test_rows_are_as_the_processor_makes_them(bases: dict[str, Path], pictures: Path, kind: str) -> None:
    """Where `<image>` stands, or before the prompt; of a path, of bytes, of an Image of datasets, or of several."""
    base = bases[kind]
    processor, tokenizer = processor_of_images(str(base)), load_tokenizer(str(base))
    file = pictures / "train-0.png"
    image, raw = Image.open(file), file.read_bytes()
    values: list[Any] = ["train-0.png", str(file), raw, {"bytes": raw, "path": None}, ["train-0.png"]]
    for value in values:
        row = {"q": "what <boi> is it?", "a": "red", "picture": value}
        for prompt, text in (("Q <image>: {q} ", f"Q {PLACE[kind[:6]]}: "), ("{q} ", PLACE[kind[:6]])):
            encoder = Encoder(tokenizer, Template(prompt, "{a}", images="picture", image_root=str(pictures)))
            shown = encoder.shown(row)
            expected = processor(text=f"{text}what ", images=image, return_tensors="pt")
            length = expected["input_ids"].shape[1]
            assert shown.ids[1 : 1 + length] == expected["input_ids"][0].tolist()
            assert shown.text.endswith("what <boi> is it? red<eos>") and shown.text.count("<img>") == 1
            assert shown.text[slice(*shown.spans[0])] == "red<eos>"
            assert encoder.images is not None
            inputs = encoder.images.inputs(row, shown.ids)
            own = {"pixel_values"} if kind == "gemma3" else {"pixel_values", "image_position_ids"}
            assert own == {name for name in inputs if "token_type" not in name}
            assert all(torch.equal(inputs[name], expected[name]) for name in own)
            types = inputs["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"]
            assert types.tolist() == [int(number == 259) for number in shown.ids]
    two = {"q": "<image> or <image>", "a": "r", "picture": ["train-0.png", "train-1.png"]}
    assert (
        Encoder(tokenizer, Template("{q}", "{a}", images="picture", image_root=str(pictures))).shown(two).ids.count(260)
        == 2
    )


def test_places_that_are_none(base: Path, pictures: Path) -> None:
    """In what is learnt, and in rows without an image, `<image>` is text; images after what is asked are left out."""
    encoder = Encoder(
        load_tokenizer(str(base)), Template("<image>{q} ", "{a}", images="picture", image_root=str(pictures))
    )
    learnt = encoder.shown({"q": "XML?", "a": "as <image>.", "picture": "train-0.png"})
    assert learnt.text.endswith("XML? as <image>.<eos>") and learnt.ids.count(260) == 1 == learnt.images
    for none in (None, [], "", {"bytes": None, "path": None}):
        assert encoder.shown({"q": "an <image> tag", "a": "b", "picture": none}).text == "<bos>an <image> tag b<eos>"
    turns = [{"role": "user", "content": "<image>A?"}, {"role": "assistant", "content": "b <image>"},
             {"role": "user", "content": "<image>C?"}]  # fmt: skip
    template = Template(messages="messages", chat_template=CHAT, images="picture", image_root=str(pictures))
    chat = Encoder(load_tokenizer(str(base)), template)
    row = {"messages": turns, "picture": ["train-0.png", "train-1.png"]}
    shown = chat.shown(row)
    assert shown.images == 1 and "b <image><eos>" in shown.text and chat.images is not None
    assert chat.images.inputs(row, shown.ids, shown.images)["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match="no character"):
        encoder.shown({"q": "\ufdd3", "a": "b", "picture": "train-0.png"})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("http://a/b.png", "an address"), ("none.png", "not there"), ("A" * 5000, "no file"), (7, "a int"),
        ("deep.png", "more than 8 bits"), ("train.jsonl", "cannot be read"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used(base: Path, pictures: Path, tmp_path: Path, value: Any, reason: str) -> None:
    for file in ("train-0.png", "train.jsonl"):
        (tmp_path / file).write_bytes((pictures / file).read_bytes())
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "deep.png")
    encoder = Encoder(load_tokenizer(str(base)), Template("{q}", "{a}", images="picture", image_root=str(tmp_path)))
    with pytest.raises(ValueError, match=reason):
        encoder.shown({"q": "a", "a": "b", "picture": value})


def test_files_that_change(base: Path, pictures: Path, tmp_path: Path) -> None:
    """A picture that was missing is found once it is there; other files are other rows; one that goes is one line."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation"):
        row = {"question": "?", "answer": "r", "picture": "a.png"}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(3)))
    recipe = read_recipe(str(recipe_of(tmp_path, base, folder)), {})
    with pytest.raises(UserError, match="not there"):
        read_sequences(recipe, tokenizer_of(recipe), "train")
    (folder / "a.png").write_bytes((pictures / "train-0.png").read_bytes())
    first = read_sequences(recipe, tokenizer_of(recipe), "train")
    before = first.examples.checksum()
    Image.new("RGB", (40, 40), "blue").save(folder / "a.png")
    other = read_sequences(recipe, tokenizer_of(recipe), "train")
    assert len(first) == len(other) == 3 and other.examples.checksum() != before
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"train.jsonl, line \d.*it was there when the rows were tokenised"):
        other[0]


def test_an_imagefolder(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Images beside their split's metadata.jsonl, under the same names in each split, as `datasets` has them; and one
    named from the folder of the data."""
    folder = tmp_path / "rows"
    for split, picture in (("train", "train-0.png"), ("validation", "train-1.png")):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.png").write_bytes((pictures / picture).read_bytes())
        rows = [{"question": "?", "answer": "r", "picture": name} for name in ("0.png", ["0.png", "train/0.png"], None)]
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = read_recipe(str(recipe_of(tmp_path, base, folder)), {})
    rows = {split: list(rows_of(recipe, split)) for split in ("train", "validation", "train[:1]+validation")}
    assert [row["picture"] for row in rows["validation"]] == [
        "validation/0.png", ["validation/0.png", "train/0.png"], None,
    ]  # fmt: skip
    assert [row["picture"] for row in rows["train[:1]+validation"]][:2] == ["train/0.png", "validation/0.png"]
    first = {split: read_sequences(recipe, tokenizer_of(recipe), split)[0] for split in ("train", "validation")}
    assert not torch.equal(*(one["pixel_values"][0] for one in first.values()))


def test_a_processor_that_is_not_known(base: Path, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(processor, "KNOWN", ("Gemma4Processor", "LlavaProcessor"))
    with pytest.raises(UserError, match="how Gemma3Processor writes images into a text is not known here"):
        Encoder(load_tokenizer(str(base)), Template("{q}", "{a}", images="picture", image_root=str(pictures)))


def test_a_conversation_with_an_image(base: Path, pictures: Path) -> None:
    """Parts of turns, as datasets for vision have them, `<image>` in a text, or neither: the image comes first."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Colour?"}]
    texts = []
    for content in (parts, "<image>Colour?", "Colour?"):
        row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "r"}]}
        template = Template(messages="messages", chat_template=CHAT, images="picture", image_root=str(pictures))
        shown = Encoder(load_tokenizer(str(base)), template).shown(row | {"picture": "train-0.png"})
        texts.append(shown.text)
        assert shown.ids.count(259) == 4 and [shown.text[a:b] for a, b in shown.spans] == ["r<eos>"]
    assert texts == ["<bos><user>\n\n<boi><img><eoi>\n\nColour?<assistant>r<eos>"] * 3


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4-clips"])
def test_rows_of_text_beside_them(bases: dict[str, Path], pictures: Path, tmp_path: Path, kind: str) -> None:
    """A batch of an image's row and of packed rows of text gives each row the logits that it has alone, and an image's
    those of the processor's own inputs."""
    base = bases[kind]
    recipe = read_recipe(str(recipe_of(tmp_path, base, pictures, max_length=LENGTH[kind[:6]])), {})
    sequences = read_sequences(recipe, tokenizer_of(recipe), "train")
    with_image = sequences.examples.have_images()
    packed = {"gemma3": 4, "gemma4": 2}[kind[:6]]
    assert sum(with_image) == 48 and len(sequences) == 48 + packed, "one each, and rows of text packed"
    pictured = next(i for i in range(len(sequences)) if "pixel_values" in sequences[i])
    text = next(i for i in range(len(sequences)) if "pixel_values" not in sequences[i])
    model = load(base, torch.float32)

    def of_rows(batch: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        with torch.no_grad():
            found, _ = labelled_logits(model, batch)
        rows = batch["rows"][batch["labels"] != IGNORED]
        return {int(row): found[rows == row] for row in rows.unique()}

    both = of_rows(collate([sequences[text], sequences[pictured]]))
    assert len(both) >= 4
    processor = processor_of_images(str(base))
    lines = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()]
    for row, found in both.items():
        line = lines[int(sequences.examples.rows[row])]
        image = Image.open(pictures / line["picture"]) if line["picture"] else None
        text = f"<bos>{PLACE[kind[:6]] if image else ''}{line['question']}{line['answer']}"
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            alone = model(**inputs).logits[0, -len(found) :]
        assert torch.allclose(found, alone, atol=1e-4), line


@pytest.mark.parametrize(
    ("kind", "method", "stage", "ranks"),
    [
        ("gemma3", "g_freeze", 1, 1),
        ("gemma3", "g_train", 1, 1),
        ("gemma4-clips", "g_freeze", 1, 1),
        ("vit", "g_train", 1, 1),
        pytest.param("gemma3", "g_freeze", 2, 2, marks=pytest.mark.full),
        pytest.param("gemma3", "g_train", 3, 2, marks=pytest.mark.full),
    ],
)
def test_it_trains(
    bases: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    kind: str,
    method: str,
    stage: int,
    ranks: int,
) -> None:
    """The tower, its projector and query heads, or MLPs, from pictures and text; the run resumes in the same bits, and
    its base is inside, bit for bit, also for images."""
    base = bases[kind]
    projector = kind.startswith("gemma")
    how = {"tower": "vision", "train_projector": projector, "method": method, "max_length": LENGTH[kind[:6]]}
    how |= {"attention": "queries"} if kind == "gemma3" else {"layers": "all"}
    rate = 5e-3 if kind == "gemma3" else 3e-2
    recipe = recipe_of(tmp_path, base, pictures, stage, learning_rate=rate, train_batch_size=16, **how)
    growth = ("--tower", "vision", *["--train-projector"] * projector)
    growth += ("--attention", "queries") if kind == "gemma3" else ("--layers", "all")
    here(capsys, "expand", base, tmp_path / "run" / "grown", *growth)
    assert "parameters" in here(capsys, "plan", recipe)
    weights = train_and_resume(recipe, ranks)
    parts = {"vision_tower", "language_model"}
    parts |= {"multi_modal_projector" if kind == "gemma3" else "embed_vision"} if projector else set()
    assert {next(part for part in parts if part in name) for name in weights} == parts
    trained = tmp_path / "run"
    consolidate(str(trained), str(tmp_path / "still"), "grown")
    assert verify(str(tmp_path / "still"), str(base))["problems"] == []
    attach_growth(str(base), str(trained / "result"), str(tmp_path / "again"))
    expected = logits(load(tmp_path / "still", torch.float32), kind)
    assert torch.equal(logits(load(tmp_path / "again", torch.float32), kind), expected)
    # In fp32: the projector's sum would be rounded once more.
    consolidate(str(tmp_path / "still"), str(tmp_path / "stock"), dtype="float32")
    assert torch.allclose(logits(load(tmp_path / "stock", torch.float32), kind), expected, atol=1e-3)
    extract_base(str(tmp_path / "still"), str(tmp_path / "base"))
    assert folder_checksums(tmp_path / "base") == folder_checksums(base)
    # Scores, at α = 0 and 1: of the task, and of other pictures and text, held out, that the base is to keep.
    kept = make_kept(tmp_path / "kept")
    fields = {"retention": str(kept), "retention_prompt": "{question}", "retention_completion": "{answer}"}
    scored = evaluate(str(tmp_path / "still"), read_recipe(str(recipe), fields), (0.0, 1.0), samples=2)
    at_0, at_1 = scored["by_alpha"]
    assert (at_0["task"]["rows"], at_0["task"]["contaminated"]) == (12, 4)  # text that is among the training rows
    assert (at_1["retention"]["rows"], at_1["retention"]["contaminated"]) == (9, 0)
    assert at_0["task"]["identical"] == at_0["retention"]["identical"] == 1
    assert at_0["retention"]["kl"] == 0 < at_1["retention"]["kl"]
    assert at_1["retention"]["from_base"]["rows"] == 9 and at_1["retention"]["loss"] != at_0["retention"]["loss"]
    learnt = 0.5 if kind == "gemma3" else 0.2
    assert at_1["task"]["loss"] < at_0["task"]["loss"] - learnt and at_1["task"]["identical"] < 1
    assert len(at_1["samples"]) == 2 and "failed" not in at_1


@pytest.mark.parametrize("alone", ["tower", "language model"])
def test_either_alone(
    bases: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, alone: str
) -> None:
    """A tower that has grown, or a language model, learns from images while the other stays the base's."""
    how: dict[str, Any] = {"tower": "vision"} if alone == "tower" else {"layers": "all"}
    recipe = recipe_of(tmp_path, bases["gemma3"], pictures, learning_rate=2e-2, train_batch_size=16, **how)
    here(capsys, "expand", bases["gemma3"], tmp_path / "run" / "grown", *(f"--{k}={v}" for k, v in how.items()))
    weights = train_and_resume(recipe, 1)
    assert weights and all(("vision_tower" in name) == (alone == "tower") for name in weights)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [*(pytest.param("gemma3", stage, marks=pytest.mark.full) for stage in (1, 2)), ("gemma3", 3), ("gemma4-clips", 3)],
)
def test_ranks_with_and_without_images(
    bases: dict[str, Path], pictures: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    """Half of the rows are text, so that at most steps one rank has an image and the other has none: as on one rank;
    and processes that read ahead change nothing."""
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()]
    text = [row for row in rows if row["picture"] is None]
    pictured = [row for row in rows if row["picture"]][:8]
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in pictures.glob("*.png"):
        (folder / file.name).symlink_to(file)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text * 2 + pictured))
    curves = []
    for ranks in (1, 2):
        place = tmp_path / str(ranks)
        place.mkdir()
        recipe = recipe_of(
            place, bases[kind], folder, stage, tower="vision", train_projector=True, layers="all", dtype="float32",
            dataloader_num_workers=ranks - 1, max_length=LENGTH[kind[:6]],
        )  # fmt: skip
        run("launch/expand.sh", recipe)
        said = start(recipe, ranks)
        history = json.loads((place / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        curves.append([entry["loss"] for entry in history if "loss" in entry])
        assert "done, 4 steps" in said
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_rows_from_parquet_and_bad_ones(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Images inside a table, as the hub has them; those that cannot be used are named."""
    file = (pictures / "train-0.png").read_bytes()
    rows = [{"question": "?", "answer": "r", "picture": {"bytes": file, "path": None}} for _ in range(6)]
    rows += [{"question": "<image> <image>", "answer": "r", "picture": {"bytes": file, "path": None}}]
    rows += [{"question": "?", "answer": "r", "picture": {"bytes": b"no picture", "path": None}}]
    rows += [{"question": "?", "answer": "r", "picture": {"bytes": None, "path": "none.png"}}]
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    recipe = read_recipe(str(recipe_of(tmp_path, base, folder, max_bad_rows=0.5)), {})
    assert len(read_sequences(recipe, tokenizer_of(recipe), "train").examples) == 6
    strict = read_recipe(str(recipe_of(tmp_path, base, folder)), {})
    with pytest.raises(UserError) as found:
        read_sequences(strict, tokenizer_of(strict), "train")
    for said in ("with 1 images and 2 places for them (<image>)", "that cannot be read", "that is not there"):
        assert said in str(found.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": "pic"}, "images: pic is not among the columns"),
        ({"images": "", "tower": "vision"}, "text alone gives them no gradient"),
        ({"switch": "row"}, "images: a switch decides by text alone"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"per_device_train_batch_size": "auto"}, "tries sequences of text alone"),
        ({"base": "TEXT"}, "has no processor for images"),
    ],
)
def test_mistakes(
    base: Path, text_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    fields: dict[str, Any], message: str,
) -> None:  # fmt: skip
    start = text_base if fields.pop("base", "") else base
    recipe = recipe_of(tmp_path, start, pictures, **fields)
    assert message in here(capsys, "train", recipe, "--check", code=2)
