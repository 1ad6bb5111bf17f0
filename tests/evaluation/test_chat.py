"""Talking with a model: what it writes, whether its skill was on, and what its base writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import grow
from grow.checkpoint.switch_record import SwitchRecord
from grow.data.template import Template
from grow.errors import UserError
from grow.evaluation.chat import Chat
from grow.model.loading import load
from grow.model.switched import put_switch, set_switch
from tests.helpers.running import here
from tests.helpers.tiny import make_recipe

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def switched(base: Path, threshold: float = 0.0) -> Any:
    """A grown model, moved, whose switch reads one feature of the first layer."""
    model = grow.grow_model(load(base, torch.float32), layers="1-3")
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    weight = torch.zeros(32)
    weight[3] = 1.0
    put_switch(model, SwitchRecord("row", 1, weight.numpy(), threshold))
    return model.eval().requires_grad_(False)


def test_prompts_as_they_are_and_by_a_template(text_base: Path) -> None:
    tokenizer, base = AutoTokenizer.from_pretrained(text_base), load(text_base, torch.float32).requires_grad_(False)
    model = switched(text_base)
    alone = Chat(base, tokenizer, max_new_tokens=8)
    both = Chat(model, tokenizer, max_new_tokens=8, compare=True)
    said = ["Hello", "the weather", "3+4=", "a", "def f(x):", "12"]
    found = [both.ask(line) for line in said]
    assert {answer.on for answer in found} == {True, False}
    assert all(answer.margin is not None and (answer.margin > 0) == answer.on for answer in found)
    for line, answer in zip(said, found, strict=True):
        expected = alone.ask(line).answer
        assert answer.base == expected and (answer.on or answer.answer == expected)
    assert any(answer.on and answer.answer != answer.base for answer in found)
    assert alone.ask("Hello").on is None
    template = Template("Q: {q} {n}\nA:", "{a}")
    asked = Chat(base, tokenizer, template, max_new_tokens=8)
    assert asked.ask('{"q": "one", "n": 2}').answer == alone.ask("Q: one 2\nA:").answer
    with pytest.raises(UserError, match="q, n: write the prompt as a JSON object"):
        asked.ask("one")
    with pytest.raises(UserError, match="no base inside"):
        Chat(base, tokenizer, compare=True)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_conversation_keeps_its_cache(text_base: Path, mode: str) -> None:
    """Each turn is answered as if the conversation were read anew."""
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    tokenizer.chat_template = CHAT
    model, base = switched(text_base), load(text_base, torch.float32).requires_grad_(False)
    set_switch(model, mode)
    talk = Chat(model, tokenizer, max_new_tokens=6, compare=True)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for said in ("Hello", "and", "3+4=", "so", "Why?"):
        talk.ask(said)
    turns = talk.turns
    assert turns is not None and len(turns) == 10
    for place in range(1, 10, 2):
        fresh = Chat(model, tokenizer, max_new_tokens=6)
        fresh.turns = list(turns[: place - 1])
        again = fresh.ask(turns[place - 1]["content"])
        assert again.answer == turns[place]["content"]
        if again.on is False or mode == "off":
            plain = Chat(base, tokenizer, max_new_tokens=6)
            plain.turns = list(turns[: place - 1])
            assert plain.ask(turns[place - 1]["content"]).answer == again.answer
    longest = max(passes)
    assert sum(5 < length < longest / 2 for length in passes) >= 1, "a later turn went on from the cache"


def test_the_command(text_base: Path, sums: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1)
    model = switched(text_base)
    grow.save_growth(model, tmp_path / "package")
    grown = tmp_path / "attached"
    here(capsys, "attach", text_base, tmp_path / "package", grown)
    said = here(capsys, "chat", grown, "--prompt", "Hello", "--compare", "--max-new-tokens", "5")
    assert "[the base: " in said
    (tmp_path / "prompts.txt").write_bytes("\ufeff3+4=\r\n\n5+\u20286=\n".encode())
    lines = here(capsys, "chat", text_base, "--prompts", tmp_path / "prompts.txt", "--recipe", recipe, "--json")
    found = [json.loads(line) for line in lines.splitlines()]
    assert [answer["prompt"] for answer in found] == ["3+4=", "5+\u20286="] and found[0]["on"] is None
    typed = iter(["Hello"])

    def ended(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ended)
    assert here(capsys, "chat", text_base, "--max-new-tokens", "3").strip()
    monkeypatch.setattr("sys.stdin", None)  # as where it is closed
    assert "no input to read prompts from" in here(capsys, "chat", text_base, code=2)
    assert "no base inside" in here(capsys, "chat", text_base, "--prompt", "a", "--compare", code=2)
    assert "no base inside" in here(capsys, "chat", text_base, "--prompt", "a", "--switch", "on", code=2)
    assert "at least 1" in here(capsys, "chat", text_base, "--prompt", "a", "--max-new-tokens", "0", code=2)
    assert "cannot be read" in here(capsys, "chat", text_base, "--prompts", tmp_path / "gone", code=2)
