"""Conversations: one text by the chat template, and of it what the assistant says, whatever the template does."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grow.data.encoder import Encoder
from grow.data.template import Template
from grow.data.tokens import encode
from tests.helpers.running import here
from tests.helpers.tiny import grow, make_base, make_data, make_recipe


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Earlier turns lose their thoughts, the last gets one even if it has none.
THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]\n"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip() }}[/]"
    "{% else %}[{{ m.role }}]\n{{ m.content }}[/]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n<think>\n{% endif %}"
)
# Qwen 3's: before the last answer an empty thought, which no prompt has.
THINKS_NOT = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}[/]\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# GLM 4.5's: nothing ends a turn but the token that begins the next one.
ENDLESS = (
    "{% for m in messages %}{{ '[assistant]' if m.role == 'assistant' else '<bos>' }}"
    "{% for call in m.tool_calls or [] %}{{ '{' + call.function.name + '}' }}{% endfor %}{{ m.content or '' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Gemma 4's: a turn goes on after a call, which ends in its own way.
CALLS_OTHERWISE = (
    "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}[assistant]"
    "{% elif m.role == 'tool' %}{{ m.content }}<bos>"
    "{% elif m.tool_calls %}{% for call in m.tool_calls %}({{ call.function.name }}){% endfor %}<eos>"
    "{% else %}{{ m.content }}[/]{% endif %}{% endfor %}"
)
MARKS_EACH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
# The system's text is put before the last thing that the user says.
MOVES = (
    "{% set first = messages[0].role == 'system' %}{% set rest = messages[1:] if first else messages %}"
    "{% for m in rest %}{% if m.role == 'user' %}(Q){% if first and loop.index0 >= rest | length - 2 %}"
    "{{ messages[0].content + ': ' }}{% endif %}{{ m.content }}(A){% else %}{{ m.content | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
SAYS_ITSELF = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '!' }}{% endgeneration %}"
    "{% else %}{{ m.content }}?{% endif %}{% endfor %}"
)
CALLS = (
    "{% for t in tools or [] %}TOOL {{ t.function.name }}\n{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Phi's: the last turn is ended by one token more, and with it the question alone.
ONE_MORE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/]' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% else %}<eos>{% endif %}"
)
# Mistral's: nothing stands before an answer, and something of its own before a call.
NO_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content }}[A]{% elif m.tool_calls %}"
    "[CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]<eos>"
    "{% elif m.role == 'tool' %}[R]{{ m.content | tojson }}[/R]{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
# DeepSeek's: no thought is written, and a prompt opens one.
NO_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '(User>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '(Assistant>' + m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}(Assistant><think>\n{% endif %}"
)
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}


@pytest.mark.parametrize(
    ("template", "turns", "learnt"),
    [
        # The same words in several mouths.
        (PLAIN, [user("Go"), assistant("Go"), user("Go"), assistant("Go")], ["Go[/]\n", "Go[/]\n"]),
        (PLAIN, [user("Hi"), assistant(" spaces \n"), user("Bye")], [" spaces \n[/]\n"]),
        (THINKS, [user("2+2?"), assistant(THOUGHT), user("Sure?"), assistant("Yes.")],
         ["Four.[/]", "\n</think>\n\nYes.[/]"]),
        (THINKS, [user("2+2?"), assistant(THOUGHT)], [f"{THOUGHT}[/]"]),
        (
            MOVES,
            [{"role": "system", "content": "Softly"}, user("a"), assistant(" b "), user("c"), assistant("d")],
            ["b<eos>", "d<eos>"],
        ),
        (SAYS_ITSELF, [user("a"), assistant("b"), user("c"), assistant("d")], ["b!", "d!"]),
        (
            CALLS,
            [user("2+2?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("Four.")],
            ['CALL add {"a": 2, "b": 2}[/]', "Four.[/]"],
        ),
        (PLAIN, [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], ["Ho[/]\n"]),
        (PLAIN, [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), assistant("Ho")], ["Ho[/]\n"]),
        (PLAIN, '[{"role": "user", "content": "Hi"}, {"role": "model", "content": "Ho"}]', ["Ho[/]\n"]),
        (ONE_MORE, [user("a"), assistant(" b"), user("c"), assistant("d")], [" b[/]", "d[/]<eos>"]),
        (
            NO_HEADER,
            [user("2+2?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": '"4"'}, assistant("Four.")],
            ['[CALLS][{"name": "add", "arguments": {"a": 2, "b": 2}}]<eos>', "Four.<eos>"],
        ),
        (
            NO_THOUGHT,
            [user("2+2?"), assistant(THOUGHT), user("Sure?"), assistant("<think>So.</think>Yes.")],
            ["\n\nFour.<eos>", "Yes.<eos>"],
        ),
        # A thought that the template writes in its own way.
        (THINKS, [user("2+2?"), assistant("<think>Two and two.</think>Four.")],
         ["Two and two.\n</think>\n\nFour.[/]"]),
        # Turns that are not to be learnt.
        (PLAIN, [user("a"), assistant("b", train=False), user("c"), assistant("d", weight=1)], ["d[/]\n"]),
        (SAYS_ITSELF, [user("a"), assistant("b", weight=0.0), user("c"), assistant("d")], ["d!"]),
        (
            CALLS,
            [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
             {"from": "observation", "value": "4"}, {"from": "gpt", "value": "Four."}],
            ["CALL add {}[/]", "Four.[/]"],
        ),
        # An empty thought, which the model has to write: the generation prompt ends before it.
        (THINKS_NOT, [user("a"), assistant("b"), user("c"), assistant("d")],
         ["b[/]\n", "<think>\n\n</think>\n\nd[/]\n"]),
        # Turns that end with the next one's beginning.
        (ENDLESS, [user("a"), assistant("b"), user("c"), assistant("d")], ["b<bos>", "d<eos>"]),
        (ENDLESS, [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("d")],
         ["{add}<bos>", "d<eos>"]),
        # Calls that end in another way than what is said, the last one too.
        (CALLS_OTHERWISE,
         [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("d")],
         ["(add)<eos>", "d[/]"]),
        (CALLS_OTHERWISE, [user("a"), assistant(None, tool_calls=[CALL])], ["(add)<eos>"]),
        # Marks for what is said and for what ends it.
        (MARKS_EACH, [user("a"), assistant("b", weight=0), user("c"), assistant("d")], ["d<eos>"]),
        # Text that spells a special token is text, what the template writes is one.
        (MOVES, [user("What is <eos>?"), assistant("The end: <eos>.")], ["The end: <eos>.<eos>"]),
    ],
)  # fmt: skip
def test_what_the_assistant_says_is_found(template: str, turns: Any, learnt: list[str], text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    row = {"m": turns, "tools": TOOLS if template == CALLS else None}
    chat = Template(messages="m", chat_template=template)
    shown = Encoder(tokenizer, chat).shown(row)
    assert [shown.text[begin:end] for begin, end in shown.spans] == learnt
    # The labels are the same, and special tokens among them stand only where the template writes them.
    (example,) = encode([row], tokenizer, chat).examples
    labels = [token for token in example.labels if token >= 0]
    assert tokenizer.decode(labels) == "".join(learnt)
    assert labels.count(tokenizer.eos_token_id) == sum(text.endswith("<eos>") for text in learnt)
    assert shown.text.startswith(tokenizer.decode(example.input_ids))


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (PLAIN, [user("Hi"), assistant(None)], "an empty turn"),
        (PLAIN, [user("Hi"), assistant([{"type": "image", "url": "a.png"}])], "not text"),
        (PLAIN, [user("Hi"), assistant("\ud800")], "surrogate"),
        (PLAIN, [user("Hi"), assistant("", tool_calls=[CALL])], "does not write"),
        (NO_THOUGHT, [user("Hi"), {"role": "tool", "content": "4"}, assistant("Ho")], "the role tool, .* not write"),
        (
            CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            [user("Hi"), assistant("", tool_calls=[CALL, CALL])],
            "does not write",
        ),
        (PLAIN, [user("Hi"), assistant("Ho", weight=0.5)], "weight is neither 0 nor 1"),
        (PLAIN, [user("Hi"), assistant("Ho", train=False)], "an assistant's turn that is to be learnt"),
        (PLAIN, [user([{"type": "image", "text": ""}, {"type": "text", "text": "Hi"}]), assistant("Ho")], "not text"),
        (PLAIN, [user("Hi")], "without an assistant's turn"),
        (PLAIN, ["Hi", "Ho"], "not an object"),
        (PLAIN, "Hi", "not JSON"),
        ("{{ raise_exception('never') }}", [user("Hi"), assistant("Ho")], r"refused by the chat template \(never\)"),
        ("{{ messages[0].content }}", [user("Hi"), assistant("Ho")], "writes nothing"),
        ("{{ messages[1].content[:3] }}", [user("Hi"), assistant("Hello there")], "cuts off|told apart"),
        ("{{ messages[1].content | length }}", [user("Hi"), assistant("Ho")], "told apart"),
    ],
)
def test_a_conversation_that_cannot_be_is_a_bad_row(template: str, turns: Any, reason: str, text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    rows = [{"m": [user("Hi"), assistant("Ho")]}, {"m": turns}]
    with pytest.raises(ValueError, match=reason):
        Encoder(tokenizer, Template(messages="m", chat_template=template)).shown(rows[1])
    assert 1 in {row for some in encode(rows, tokenizer, Template(messages="m", chat_template=template)).bad.values()
                 for row in some}  # fmt: skip


def test_a_template_that_writes_the_day(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    template = "{{ strftime_now('%d %B %Y, %H:%M, 100%%') }}|" + PLAIN
    row = {"m": [user("Hi"), assistant("Ho")]}
    shown = Encoder(tokenizer, Template(messages="m", chat_template=template, day="2024-02-29")).shown(row)
    assert shown.text.startswith("29 February 2024, 00:00, 100%|[user]Hi")


def test_a_template_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base without a template is one line at --check; a field brings one, in a file beside the recipe."""
    base, data = make_base(tmp_path / "base", "text"), make_data(tmp_path / "data")
    for file in data.iterdir():
        file.write_text('{"m": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}\n' * 20)
    fields = {"method": "sft", "prompt": "", "completion": "", "messages": "m"}
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path, data, 2, **fields)
    assert "no chat template" in here(capsys, "train", recipe, "--check", code=2)
    (tmp_path / "mine.jinja").write_text(PLAIN)
    shown = here(capsys, "preview", recipe, "--chat_template", "mine.jinja", "--limit", "1")
    assert "[user]1+1=[/]\n[assistant]⟦2[/]\n⟧" in shown
    here(capsys, "train", recipe, "--check", "--chat_template", "mine.jinja")
    grow("train", recipe, "--chat_template", "mine.jinja", "--max_steps", "1")
    grow("consolidate", tmp_path / "run", tmp_path / "stock")
    conversation = [user("1+1="), assistant("2")]
    stock = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert stock.apply_chat_template(conversation, tokenize=False) == "[user]1+1=[/]\n[assistant]2[/]\n"
    assert "no such file" in here(capsys, "train", recipe, "--check", "--chat_template", "none.jinja", code=2)
