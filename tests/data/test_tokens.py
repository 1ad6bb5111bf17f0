"""Tokens are those of the text as a whole, cut where the learning begins, whatever the tokenizer."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grow.data.encoder import Encoder
from grow.data.labels import IGNORED
from grow.data.load import load_rows
from grow.data.packing import PackedDataset
from grow.data.template import Template
from grow.data.tokenizer import load_tokenizer
from grow.data.tokens import encode, encode_cached
from grow.errors import UserError
from grow.evaluation.generation import generate
from grow.model.loading import load
from tests.helpers.running import here
from tests.helpers.tiny import make_base, make_data, make_recipe


def word_pieces(folder: Path, specials: dict[str, str]) -> Any:
    """Bytes, and pairs of letters among them that join across a border: "a" + "b" is one token."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [("Ġ", "a"), ("a", "b"), ("c", "d"), ("Ã", "©")]
    vocabulary |= {"".join(pair): 256 + i for i, pair in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(5)  # as some files on the hub have it
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("specials", [{}, {"bos_token": "<s>"}, {"eos_token": "</s>", "pad_token": "<p>"}])
@pytest.mark.parametrize(
    ("prompt", "completion", "first"),
    [
        ("xxa", "b!", "ab"),  # one token across the border: the completion's
        ("x", " ab", " a"),
        ("x ", "ab", " a"),
        ("é", "é", "é"),
        ("", "cd", "cd"),
    ],
)
def test_the_border_is_cut_by_characters(
    specials: dict[str, str], prompt: str, completion: str, first: str, tmp_path: Path
) -> None:
    tokenizer = word_pieces(tmp_path, specials)
    template = Template("{p}", "{c}")
    row = {"p": prompt, "c": completion}
    found = encode([row], tokenizer, template)
    if not specials and prompt == "":  # a token of which no label can be made, the very first, is no row by itself
        assert found.bad == {"without a token to learn": [0]}
        return
    shown = Encoder(tokenizer, template).shown(row)
    whole = tokenizer(prompt + completion, add_special_tokens=False).input_ids
    begin, end = [[token] if token is not None else [] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert shown.ids == [*begin, *whole, *end]
    learnt = [token for token, is_learnt in zip(shown.ids, shown.learnt, strict=True) if is_learnt]
    assert tokenizer.decode(learnt[:1]) == first and learnt[len(learnt) - len(end) :] == end
    assert [label for label in found.examples[0].labels if label != IGNORED] == learnt[not prompt and not begin :]


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion", "learnt"),
    [("A:", " 4", " 4"), ("A: ", "4", "4"), ("A: ", " 4", " 4"), ("", " 4", " 4"), ("A:\n", "  4 ", "  4 ")],
)
def test_a_space_that_is_a_token_is_whose_it_is(
    trims: bool, prompt: str, completion: str, learnt: str, tmp_path: Path
) -> None:
    """Llama 3's tokenizer trims spaces off what a token stands for, and has a space before a number as a token."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trims)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    shown = Encoder(made, Template("{p}", "{c}")).shown({"p": prompt, "c": completion})
    assert made.decode([i for i, own in zip(shown.ids, shown.learnt, strict=True) if own]) == f"{learnt}</s>"
    chat = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": prompt or "?"}, {"role": "assistant", "content": completion}]
    shown = Encoder(made, Template(messages="m", chat_template=chat)).shown({"m": [*turns, *turns]})
    assert made.decode([i for i, own in zip(shown.ids, shown.learnt, strict=True) if own]) == f"{learnt}\n" * 2


def test_a_begin_or_an_end_that_a_template_writes_is_not_doubled(text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    shown = Encoder(tokenizer, Template("<bos>Q {q}", "A {a}<eos>")).shown({"q": "<eos>", "a": "<bos>"})
    assert shown.ids.count(tokenizer.bos_token_id) == 1 and shown.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(shown.ids) == shown.text == "<bos>Q <eos>A <bos><eos>"


def test_special_tokens_that_rows_spell_are_text(real_base: Path) -> None:
    """With the real tokenizer, whose special tokens are entries of its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    rows = [{"q": "End a turn with <end_of_turn>, a text with <eos>.", "a": "<bos>?"}, {"q": "plain", "a": "text"}]
    found = encode(rows, tokenizer, Template("<start_of_turn>{q}", " {a}")).examples
    names = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    ids = tokenizer.convert_tokens_to_ids(list(names))
    special, start = [[i for i in e.input_ids if i in ids] for e in found], ids[2]
    assert special == [[tokenizer.bos_token_id, start]] * 2
    assert tokenizer.decode(found[0].input_ids[2:]).endswith("<end_of_turn>, a text with <eos>. <bos>?")


@pytest.mark.parametrize("code", ["\ufdd0", "\ufdd1", "\ufdd2"])
def test_what_stands_for_special_tokens_is_no_text(code: str, text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    rows = [{"p": "<eos>", "c": f"a\ufdd1258\ufdd2{code}"}, {"p": "<eos>", "c": "b"}]
    assert list(encode(rows, tokenizer, Template("{p}", "{c}")).bad.values()) == [[0]]


def test_without_offsets_it_is_cut_by_what_begins_alike(text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    fast, slow = Encoder(tokenizer, Template("{p}", "{c}")), Encoder(tokenizer, Template("{p}", "{c}"))
    slow.fast = False
    for row in ({"p": "a b", "c": " c"}, {"p": "", "c": "d<eos>"}):
        one, other = fast.table([row]), slow.table([row])
        assert one.equals(other)


def test_ids_beyond_the_embedding_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base", "text")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{n}>" for n in range(70)])  # to 329 of 320
    tokenizer.save_pretrained(base)
    data = make_data(tmp_path / "data")
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path, data, 2, method="sft", prompt="<69>{question}")
    assert "the token 328, but the embedding has 320 rows" in here(capsys, "train", recipe, "--check", code=2)
    here(capsys, "train", recipe, "--check", "--prompt", "<3>{question}")


def test_the_cache_is_the_same_as_memory(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By several processes; and found again by what rows, template and tokenizer are, not by where they lie."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("grow.data.tokens._MANY", 1000)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        rows = [json.dumps({"q": f"{n}?", "a": "yes " * (n % 9)}) for n in range(2600)]
        (tmp_path / folder / "train.jsonl").write_text("\n".join(rows))
    tokenizer, template = AutoTokenizer.from_pretrained(text_base), Template("{q}", "{a}")
    memory = encode(load_rows(str(tmp_path / "one"), "train"), tokenizer, template, 32)
    found = [encode_cached(load_rows(str(tmp_path / f), "train"), tokenizer, template, 32) for f in ("one", "two")]
    for one in found:
        assert one.bad == memory.bad and one.examples.checksum() == memory.examples.checksum()
        assert one.examples[700] == memory.examples[700] and len(one.examples) == len(memory.examples)
    files = {path.name for path in (tmp_path / "cache" / "grow").glob("*.arrow")}
    assert len(files) == 2, "two processes, one file each; read again and not made again"
    encode_cached(load_rows(str(tmp_path / "one"), "train"), tokenizer, Template("{q} ", "{a}"), 32)
    assert len(list((tmp_path / "cache" / "grow").glob("*.arrow"))) == 4


def test_a_cache_that_cannot_be_written_is_one_line(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, make_data(tmp_path / "data"), 2, method="sft")
    assert "HF_DATASETS_CACHE" in here(capsys, "train", recipe, "--check", code=2)


def test_preview_says_what_is_learnt(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"q": "1+1=", "a": 2}\n{"q": "0/0=", "a": null}\n{"q": "a", "a": "\\u001b"}\n'
    )
    fields = {"method": "sft", "prompt": "{q}", "completion": " {a}", "max_bad_rows": 1}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, tmp_path, 2, **fields)
    facts = json.loads(here(capsys, "preview", recipe, "--json", "--limit", "0"))
    assert facts["rows"][0]["text"] == "<bos>1+1= 2<eos>" and facts["rows"][0]["learnt"] == " 2<eos>"
    assert facts["rows"][1] == {"row": 1, "bad": "without a value in a column"}
    assert (facts["of"], facts["bad_rows"], facts["labels"]) == (3, 1, 6)
    shown = here(capsys, "preview", recipe, "--limit", "1")
    assert "<bos>1+1=⟦ 2<eos>⟧" in shown and "1 of 3 rows cannot be used" in shown and "row 1:" not in shown
    assert "--limit -1" in here(capsys, "preview", recipe, "--limit", "-1", code=2)


def test_generation_is_asked_what_training_showed(text_base: Path, tmp_path: Path) -> None:
    """The prompt's tokens are those before the first that is learnt; what the model's own generation config says of
    sampling and lengths plays no part."""
    (tmp_path / "test.jsonl").write_text('{"q": "abc", "a": "def"}\n{"q": "ab", "a": "longer than that"}\n')
    rows = load_rows(str(tmp_path), "test")
    tokenizer, model = AutoTokenizer.from_pretrained(text_base), load(text_base, torch.float32)
    template = Template("{q}", "{a}")
    expected = generate(model, tokenizer, template, rows)
    for name, value in {"do_sample": True, "temperature": 9.0, "max_length": 1, "repetition_penalty": 3.0}.items():
        setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, template, rows) == expected
    assert model.generation_config.temperature == 9.0
    assert [row["reference"] for row in expected] == ["def", "longer than that"]
    # One row alone, by a stock call.
    ids = torch.tensor([Encoder(tokenizer, template).shown(rows[0]).ids[:4]])
    assert tokenizer.decode(ids[0]) == "<bos>abc"
    model.generation_config = type(model.generation_config)()
    written = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=[258, tokenizer("\n").input_ids[0]])
    text = tokenizer.decode(written[0, 4:], skip_special_tokens=True).strip().split("\n")[0]
    assert expected[0]["output"].startswith(text) or text.startswith(expected[0]["output"])


def test_padding_without_a_pad_token(text_base: Path, tmp_path: Path) -> None:
    shutil.copytree(text_base, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "pad_token"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.pad_token is None
    examples = encode([{"q": "1", "a": "2"}], tokenizer, Template("{q}", "{a}")).examples
    item = PackedDataset(examples, 8, 0)[0]
    assert item["labels"].tolist() == [IGNORED, tokenizer("2").input_ids[0], 258, *[IGNORED] * 5]
    assert np.all(item["rows"].numpy() == [0, 0, 0, -1, -1, -1, -1, -1]) and io.BytesIO() is not None


def test_a_folder_without_a_tokenizer(text_base: Path, tmp_path: Path) -> None:
    """transformers would make up one of five tokens by the class that the config names."""
    shutil.copytree(text_base, tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer; save the base's there"):
        load_tokenizer(str(tmp_path / "base"))
