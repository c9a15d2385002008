"""One chat template: how it wants its messages, and what it puts around an answer.

Templates differ in what they read: the thought of an answer is `reasoning_content` in one and `thinking` in another;
the arguments of a call are an object in one and JSON text in another. `render` gives each what it reads. What stands
around an answer is learned once, by rendering a placeholder as the answer: an empty thought before it, the token that
ends the turn. In some families (GLM) that is the token of the next role, which the template writes only when it comes.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Set
from typing import Any

from jinja2 import TemplateError, meta, nodes

from nanoft import UserError
from nanoft.data.formats import Message
from nanoft.data.template_sandbox import TEMPLATE_ERRORS, BoundedEnvironment, LimitExceeded, find_marks
from nanoft.data.tokenizer_files import PLACEHOLDER

# For a base model without a template: ChatML as plain text, since the model does not have ChatML's tokens; a turn ends
# with the end-of-sequence token.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For `model.chat_template=chatml`, if the model does have them.
CHATML = DEFAULT_TEMPLATE.replace("(eos_token if message.role == 'assistant' else '<|im_end|>')", "'<|im_end|>'")
THOUGHT = re.compile(r"\s*<(\w+)>(.*?)</\1>\s*", re.DOTALL)  # at the beginning of an answer
EMPTY_THOUGHT = re.compile(r"\s*<(\w+)>\s*</\1>\s*")  # <think></think>
THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")  # what templates call the thought of an answer
AS_USED = (
    "the chat template renders an answer differently from what follows the generation prompt: "
    "trained on the generation prompt, the raw answer and the end of turn"
)
USER = "the user's text"
WHAT = {"user": USER, "system": "the system message", "tool": "the result of a tool"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # variables of every template


class TemplateRefusal(UserError):
    """The chat template cannot render these messages, or not in a way that can be trained on."""


class ChatTemplate:
    """A compiled template; raises one of COMPILE_ERRORS.

    Args:
        special: the special tokens that every template is given: bos_token, eos_token, ...
        control: matches the tokenizer's control tokens.
        stops: control tokens that are known to end an answer.
    """

    def __init__(
        self, source: str, environment: BoundedEnvironment, special: Mapping[str, str], control: re.Pattern[str],
        stops: Set[str],
    ):  # fmt: skip
        self.source, self._environment, self._special = source, environment, special
        self._control, self.stops = control, stops
        self._compiled = environment.compile_bounded(source)
        tree = environment.parse(source)
        self.variables = meta.find_undeclared_variables(tree)
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._thought = next((name for name in THOUGHT_NAMES if name in names), THOUGHT_NAMES[0])
        around = self._probe([])
        self.lead, self.tail = around or ("", "")
        self.has_empty_thought = bool(EMPTY_THOUGHT.fullmatch(self.lead))
        self.turn_end = self.end_of_turn(self.tail)
        self.next_role: dict[str, str] = {}  # user, tool -> the token that ends an answer before it
        for role in ("user", "tool") if around and not self.turn_end else ():
            _, tail = self._probe([{"role": role, "content": "b"}]) or ("", "")
            if (following := control.match(tail)) and following[0] in stops:
                self.next_role[role] = following[0]

    def render(self, messages: list[Message], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        """The string that the model sees, with generation marks; raises TemplateRefusal."""
        given = {"documents": None, "add_generation_prompt": add_generation_prompt, **self._special, **variables}
        if self._thought != THOUGHT_NAMES[0]:
            messages = [{self._thought if k == THOUGHT_NAMES[0] else k: m[k] for k in m} for m in messages]
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        try:
            text = self._environment.render(self._compiled, messages=messages, **given)
            # Arguments that it shows as Python shows an object, {'city': 'Rome'}, were expected as JSON text.
            if not any(call["arguments"] and str(call["arguments"]) in text for call in calls):
                return text
        except TEMPLATE_ERRORS as error:
            if not calls or isinstance(error, TemplateError):
                raise TemplateRefusal(f"the chat template refuses these messages: {_words(error)}") from error
        try:
            return self._environment.render(self._compiled, messages=_with_text_arguments(messages), **given)
        except TEMPLATE_ERRORS as error:
            raise TemplateRefusal(f"the chat template refuses these messages: {_words(error)}") from error

    def end_of_turn(self, text: str, at_once: bool = False) -> re.Match[str] | None:
        """The token that ends the turn: of the first run of control tokens, the first that is a stop, or the first.

        Cohere: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, of which the second stops. `at_once`: nothing may precede it.
        """
        first = run = self._control.match(text) if at_once else self._control.search(text)
        while run and run[0] not in self.stops:
            run = self._control.match(text, run.end())
        return run or first

    def _probe(self, following: list[Message]) -> tuple[str, str] | None:
        """What the template puts between the prompt and an answer (or nothing, if they do not fit), and after it."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACEHOLDER}]
        for tools in (None, [TOOL]):  # some need tools
            try:
                before = find_marks(self.render(messages[:1], True, {"tools": tools}))[0]
                after = find_marks(self.render([*messages, *following], False, {"tools": tools}))[0]
            except TemplateRefusal as refusal:
                if isinstance(refusal.__cause__, LimitExceeded):
                    return None
                continue
            start = len(before) if after.startswith(before) else len(after)
            if PLACEHOLDER in after:
                return after[start:].partition(PLACEHOLDER)[0], after.partition(PLACEHOLDER)[2]
        return None


def parts_of(message: Message) -> list[tuple[str, str, Message]]:
    """What a message says: (what it is, its text, the message with a placeholder instead of it)."""
    content, calls = message.get("content", ""), message.get("tool_calls", [])
    found = THOUGHT.match(content) if message["role"] == "assistant" else None
    spans = [found.span(2), (found.end(), len(content))] if found else [(0, len(content))]
    what = WHAT.get(message["role"], "the text beside tool calls" if calls else "an answer or its thought")
    parts: list[tuple[str, str, Message]] = []
    for start, end in spans:
        replaced = {**message, "content": content[:start] + PLACEHOLDER + content[end:]}
        parts.append((what, content[start:end].strip(), replaced))
    if thought := message.get("reasoning_content"):
        parts.append(("reasoning_content", thought.strip(), {**message, "reasoning_content": PLACEHOLDER}))
    for at, call in enumerate(calls):
        other = {**call, "function": {**call["function"], "name": PLACEHOLDER}}
        replaced = {**message, "tool_calls": [*calls[:at], other, *calls[at + 1 :]]}
        parts.append(("tool_calls", call["function"]["name"], replaced))
    return [part for part in parts if part[1]]


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": [*map(as_text, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]


def _words(error: BaseException) -> str:
    """The template's own words, or where it fails: a Python error says little without its line."""
    if isinstance(error, TemplateError) or error.__traceback__ is None:
        return str(error)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f"it fails in its line {lines[-1] if lines else '?'}: {error or 'nested too deeply'}"
