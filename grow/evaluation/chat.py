"""Talks with a model: prompts by a recipe's template, by the chat template, or as they are."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, GenerationConfig, TextStreamer

from grow.data.chat import chat_template
from grow.data.conversation import Turn
from grow.data.encoder import Encoder
from grow.data.rendering import render_chat
from grow.data.template import Template
from grow.data.tokenizer import pad_token_id
from grow.data.writing import write
from grow.errors import UserError
from grow.model.alpha import base_inside, has_base_inside
from grow.model.switched import switch_decided


@dataclass(frozen=True)
class Answer:
    """Holds what was asked and what the model wrote; whether its switch was on for it, if it has one, or which of
    several skills were; what its base wrote, if that was asked for; and by how much the score of a switch that was
    fitted is above its threshold."""

    prompt: str
    answer: str
    on: bool | list[str] | None
    base: str | None
    margin: float | None = None


class Chat:
    """Asks a model. Under a chat template each question continues the conversation, whose KV cache is kept.

    `template` is a recipe's; None takes the tokenizer's chat template or, where it has none, prompts as they are.
    `temperature` 0 is greedy. Raises UserError for `compare` without a base inside the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        compare: bool = False,
    ):
        if compare and not has_base_inside(model):
            raise UserError(
                "--compare: the model has no base inside; name a grown checkpoint, a growth's run or a LoRA's"
            )
        self.model, self.tokenizer, self.compare = model, tokenizer, compare
        self.turns: list[Turn] | None = None
        if template is None:
            has_template = bool(getattr(tokenizer, "chat_template", None))
            template = Template(messages="messages") if has_template else Template("{prompt}", "{answer}")
        self.template = template
        if template.messages:
            self.turns = []
        self._cache, self._cached = DynamicCache(config=model.config), list[int]()
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        self.settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self._ends(), pad_token_id=pad_token_id(tokenizer), **drawn
        )

    def ask(self, said: str, stream: bool = False) -> Answer:
        """Returns the answer to a prompt; `stream` prints it as it is written. Raises UserError for a prompt that the
        template cannot take."""
        text = self._prompt(said)
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if not self.template.messages:
            ids = [*Encoder(self.tokenizer, self.template).begin(), *ids]
        options: dict[str, Any] = {"past_key_values": self._kept(ids)}
        if stream:
            options["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        written = write(self.model, [ids], self.settings, **options)[0].tolist()
        decided, margin = switch_decided(self.model), _margin(self.model)
        self._cached = [*ids, *written][: self._cache.get_seq_length()]
        answer, base = self._decoded(written), None
        if self.compare:
            with base_inside(self.model):
                base = self._decoded(write(self.model, [ids], self.settings)[0].tolist())
        if self.turns is not None:
            self.turns.append({"role": "assistant", "content": answer})
        return Answer(said, answer, _on(decided), base, margin)

    def _prompt(self, said: str) -> str:
        """Returns the text of a prompt. Columns are filled from a JSON object or, if it is one column, as they are."""
        if self.turns is not None:
            self.turns.append({"role": "user", "content": said})
            return self._rendered(self.turns, add_generation_prompt=True)
        columns = dict.fromkeys(Template(self.template.prompt).columns())
        row: Any = dict.fromkeys(columns, said)
        if len(columns) > 1:
            try:
                row = json.loads(said)
            except ValueError:
                row = None
        if not isinstance(row, dict):
            raise UserError(f"the template takes {', '.join(columns)}: write the prompt as a JSON object with these")
        try:
            return self.template.fill(self.template.prompt, row)
        except ValueError as error:
            raise UserError(f"the prompt cannot be put into the template: {error}") from None

    def _rendered(self, turns: list[Turn], add_generation_prompt: bool) -> str:
        source, tokens = chat_template(self.template, self.tokenizer), self.tokenizer.special_tokens_map
        try:
            return render_chat(turns, source, None, tokens, self.template.day, add_generation_prompt)[0]
        except ValueError as error:
            raise UserError(f"the conversation is {error}") from None

    def _kept(self, ids: list[int]) -> DynamicCache:
        """Returns the KV cache, emptied unless what it holds is how the prompt begins."""
        if not self._cached or ids[: len(self._cached)] != self._cached or len(ids) == len(self._cached):
            self._cache = DynamicCache(config=self.model.config)
        return self._cache

    def _ends(self) -> list[int] | None:
        """Returns the tokens that end an answer: those of the model, of the tokenizer and of an assistant's turn."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        if self.turns is not None:
            asked: list[Turn] = [{"role": "user", "content": "a"}]
            before = self._rendered(asked, add_generation_prompt=True)
            whole = self._rendered([*asked, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
            after = self.tokenizer(whole[len(before) + 1 :], add_special_tokens=False).input_ids
            ends |= {number for number in after if number in self.tokenizer.all_special_ids}
        return sorted(number for number in ends if number is not None) or None

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _margin(model: Any) -> float | None:
    """Returns by how much a single switch that decides by itself was above its threshold."""
    switch = getattr(model, "switch", None)
    margin_R = getattr(switch, "margin_R", None) if getattr(switch, "mode", "") == "auto" else None
    return None if margin_R is None else round(float(margin_R[0]), 4)


def _on(decided: Any) -> bool | list[str] | None:
    if isinstance(decided, dict):
        return [name for name, of_skill in decided.items() if of_skill.any()]
    return None if decided is None else bool(decided.any())
