"""Control tokens, such as <|im_end|>, that are spelled out in the texts of the data.

Text stays text: "</s>" in a question must not end the prompt. So its characters are separated, and the tokenizer does
not see the token. In data that was rendered beforehand, the tokens are meant: data.control_tokens=parse.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from typing import Any

from tokenizers import Tokenizer

from nanoft.data.chat_template import TemplateRefusal
from nanoft.data.formats import Message
from nanoft.data.tokenizer_files import BREAK

IMAGES = re.compile(r"[<\[].*(image|img|vision).*[>\]]", re.IGNORECASE)  # tokens that stand for or enclose an image


class ControlTokens:
    """The control tokens of a tokenizer, and whether their characters in a text are parsed as tokens (`parsed`)."""

    def __init__(self, tokenizer: Tokenizer, parsed: bool):
        self.parsed, added = parsed, tokenizer.get_added_tokens_decoder()
        self.ids = {number for number, token in added.items() if token.special and token.content}
        images = [t.content for t in added.values() if IMAGES.fullmatch(t.content) and (parsed or not t.special)]
        self.images = _any_of(images) if images else None  # what would be encoded as an image
        self.texts = sorted((added[number].content for number in self.ids), key=len, reverse=True)
        self.pattern = _any_of(self.texts)
        breakable = [text for text in self.texts if len(text) > 1]
        self._breakable, self._shortest = _any_of(breakable), min(map(len, breakable), default=0)
        self._stops: tuple[str, ...] = ()
        self._written: set[str] = set()

    def learn(self, stops: Collection[str], prompt: str) -> None:
        """Store which of them stop an answer, and which the chat template writes itself, as in this prompt."""
        self._stops, self._written = tuple(stops), {*stops, *self.pattern.findall(prompt)}

    def escape(self, value: Any) -> Any:
        """Break up the control tokens in the texts of a message, however deep, unless they are parsed."""
        if isinstance(value, str):
            while len(value) >= self._shortest and self.find(value):
                value = self._breakable.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        elif isinstance(value, dict):
            return {self.escape(key): self.escape(part) for key, part in value.items()}
        elif isinstance(value, list):
            return [self.escape(part) for part in value]
        return value

    def find(self, text: str) -> str | None:
        """The first control token that is spelled out in a text and would be escaped."""
        found = None if self.parsed else self._breakable.search(text)
        return found[0] if found else None

    def clean(self, message: Message) -> Message:
        """A message for the template: escaped or, if parsed, without the end token, which the template writes."""
        if not self.parsed or "content" not in message:
            return self.escape(message)
        said = message["content"]
        while message["role"] == "assistant" and self.is_ended(said):
            said = said.rstrip()
            said = said.removesuffix(next(stop for stop in self._stops if said.endswith(stop)))
        if written := [token for token in self.pattern.findall(said) if token in self._written]:
            fix = "set data.format=raw_prompt_completion or text, or data.control_tokens=text"
            raise TemplateRefusal(f"a message contains {written[0]}, which the chat template writes: {fix}")
        return {**message, "content": said}

    def is_ended(self, text: str) -> bool:
        """Whether a stop token ends the text, if they are parsed."""
        return self.parsed and text.rstrip().endswith(self._stops)

    def shown(self, ids: list[int], decode: Callable[[list[int], bool], str]) -> str:
        r"""Decoded ids with their control tokens; one that is only spelled out gets a backslash: \</s>."""
        text = decode(ids, True)
        if len(self.pattern.findall(text)) == sum(token in self.ids for token in ids):
            return text
        parts = [(of, decode(list(own), True)) for of, own in itertools.groupby(ids, self.ids.__contains__)]
        return "".join(part if is_control else self.pattern.sub(r"\\\g<0>", part) for is_control, part in parts)

    def remove(self, text: str) -> str:
        """A reference in the form of a decoded answer: without control tokens, if they are parsed."""
        return self.pattern.sub("", text).strip() if self.parsed else text


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
