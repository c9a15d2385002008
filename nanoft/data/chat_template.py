"""One chat template: the form in which it reads messages, and the text that it puts around an answer.

Templates read different names: the thought of an answer is `reasoning_content` in one and `thinking` in another; the
arguments of a call are an object in one and JSON text in another. `render` gives each template what it reads. The text
around an answer (an empty thought before it, the token that ends the turn) is found once, by rendering a placeholder as
the answer. In some families (GLM), the token of the next role ends the turn; the template writes it only when that
turn follows.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import traceback
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from tokenizers import Tokenizer

from nanoft import UserError
from nanoft.data.formats import Message
from nanoft.data.template_sandbox import TEMPLATE_ERRORS, BoundedEnvironment, LimitExceeded, find_marks
from nanoft.data.tokenizer_files import PLACEHOLDER, read_template

# For a base model without a template: ChatML as plain text, because the model lacks ChatML's tokens; an answer ends
# with the end-of-sequence token.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For `model.chat_template=chatml`, if the model has these tokens.
CHATML = DEFAULT_TEMPLATE.replace("(eos_token if message.role == 'assistant' else '<|im_end|>')", "'<|im_end|>'")
THOUGHT = re.compile(r"\s*<(\w+)>(.*?)</\1>\s*", re.DOTALL)  # at the beginning of an answer
EMPTY_THOUGHT = re.compile(r"\s*<(\w+)>\s*</\1>\s*")  # <think></think>
THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")  # what templates call the thought of an answer
# What closes a thought, besides </name> for <name>: Cohere's tokens, Gemma 4's channel.
CLOSINGS = {"<|START_THINKING|>": "<|END_THINKING|>", "<|channel>thought": "<channel|>"}
OPEN_THOUGHT = re.compile(  # a thought that the end of a prompt opens, and perhaps closes at once
    r"\s*(?P<opening><\w+>|<\|START_THINKING\|>|<\|channel>thought)(?P<space>\s*)"
    r"(?P<closed>(?:</\w+>|<\|END_THINKING\|>|<channel\|>)\s*)?$"
)
AS_USED = (
    "the chat template renders an answer differently from what follows the generation prompt: "
    "trained on the generation prompt, the raw answer and the end of turn"
)
PLAIN = {"role", "content"}  # the fields of a message without calls or a separate thought
USER = "the user's text"
WHAT = {"user": USER, "system": "the system message", "tool": "the result of a tool"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
Marked = tuple[str, list[tuple[int, int]]]  # a text, and the marked spans in it


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
        self._control, self._stops = control, stops
        self._compiled = environment.compile_bounded(source)
        self.variables = meta.find_undeclared_variables(environment.parse(source))
        read = [name for name in THOUGHT_NAMES if re.search(rf"\.{name}\b|(['\"]){name}\1", source)]
        self._thought = read[0] if read else THOUGHT_NAMES[0]
        around = self._probe([])
        self.lead, self.tail = around or ("", "")
        self.has_empty_thought = bool(EMPTY_THOUGHT.fullmatch(self.lead))
        self.turn_end = self._end_of_turn(control.search(self.tail), self.tail)
        self._ending = self.tail[: self.turn_end.end()] if self.turn_end else ""
        self.next_role: dict[str, str] = {}  # user, tool -> the token that ends an answer before it
        for role in ("user", "tool") if around and not self.turn_end else ():
            _, tail = self._probe([{"role": role, "content": "b"}]) or ("", "")
            if (following := control.match(tail)) and following[0] in stops:
                self.next_role[role] = following[0]

    def render(self, messages: list[Message], add_generation_prompt: bool, variables: Mapping[str, Any]) -> Marked:
        """The text that the model sees, and the spans of {% generation %} in it; raises TemplateRefusal."""
        given = {"documents": None, "add_generation_prompt": add_generation_prompt, **self._special, **variables}
        if self._thought != THOUGHT_NAMES[0]:
            messages = [{self._thought if k == THOUGHT_NAMES[0] else k: m[k] for k in m} for m in messages]
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        try:
            text = self._attempt(messages, given)
            # A template that prints arguments like a Python object, {'city': 'Rome'}, expects JSON text instead.
            if not any(call["arguments"] and str(call["arguments"]) in text for call in calls):
                return find_marks(text)
        except TemplateRefusal as refusal:
            if not calls or isinstance(refusal.__cause__, TemplateError):
                raise
        messages = copy.deepcopy(messages)
        for call in itertools.chain(*(message.get("tool_calls", ()) for message in messages)):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return find_marks(self._attempt(messages, given))

    def _attempt(self, messages: list[Message], variables: Mapping[str, Any]) -> str:
        try:
            return self._environment.render(self._compiled, messages=messages, **variables)
        except TEMPLATE_ERRORS as error:
            said = str(error)
            if not isinstance(error, TemplateError):  # a Python error needs its line to be understood
                frames = traceback.walk_tb(error.__traceback__)
                lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
                said = f"it fails at line {lines[-1] if lines else '?'}: {error or 'nested too deeply'}"
            raise TemplateRefusal(f"the chat template refuses these messages: {said}") from error

    def _end_of_turn(self, first: re.Match[str] | None, text: str) -> re.Match[str] | None:
        """The token that ends the turn: the first stop token in the first run of control tokens, or else its first.

        Cohere: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, of which the second is the stop token.
        """
        run = first
        while run and run[0] not in self._stops:
            run = self._control.match(text, run.end())
        return run or first

    def end_of_answer(self, text: str, start: int) -> int:
        """The position after the token that ends the turn; what a template adds (a newline) is not a target."""
        if self.tail and text.endswith(self.tail):
            return len(text) - len(self.tail) + len(self._ending or self.tail.rstrip())
        found = list(self._control.finditer(text, start))
        if stops := [match.end() for match in found if match[0] in self._stops]:
            return stops[-1]
        last = found[-1].end() if found else len(text)
        return last if found and not text[last:].strip() else len(text.rstrip())

    def end_of_mark(self, text: str, end: int) -> int:
        """The position after the token that ends the turn, the last inside the mark that ends at `end` or after it."""
        inside = text[:end].rstrip()
        if any(match.end() == len(inside) for match in self._control.finditer(inside)):
            return len(inside)
        following = self._end_of_turn(self._control.match(text, end), text)
        return following.end() if following else end

    def verbatim(self, message: Message, text: str, start: int) -> int:
        """Where the turn ends if exactly the answer and its end follow `start`, which saves a rendering; else 0."""
        if self.has_empty_thought and message.get("content", "")[:1].isspace():
            return 0  # the space follows the thought, which is removed
        lead = "" if self.has_empty_thought else self.lead
        for words in self.verbatim_answers(message) if self._ending else ():
            if text.startswith(lead + words + self._ending, start):
                return start + len(lead + words + self._ending)
        return 0

    def verbatim_answers(self, message: Message) -> list[str]:
        """A plain answer in the two forms that templates write: unchanged, or trimmed."""
        content = message.get("content", "")
        return [words for words in (content, content.strip()) if words and message.keys() <= PLAIN]

    def _probe(self, following: list[Message]) -> tuple[str, str] | None:
        """The text between the prompt and an answer (empty if they do not fit together), and the text after it."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACEHOLDER}]
        for tools in (None, [TOOL]):  # some need tools
            try:
                before = self.render(messages[:1], True, {"tools": tools})[0]
                after = self.render([*messages, *following], False, {"tools": tools})[0]
            except TemplateRefusal as refusal:
                if isinstance(refusal.__cause__, LimitExceeded):
                    return None
                continue
            start = len(before) if after.startswith(before) else len(after)
            if PLACEHOLDER in after:
                return after[start:].partition(PLACEHOLDER)[0], after.partition(PLACEHOLDER)[2]
        return None


def choose_template(wanted: str, templates: Mapping[str, str], tokenizer: Tokenizer) -> str:
    """What `model.chat_template` names: `chatml`, one of the model's own templates, or a file."""
    has_chatml = tokenizer.token_to_id("<|im_end|>") is not None
    known = {"chatml": CHATML if has_chatml else DEFAULT_TEMPLATE, **templates}
    if wanted in known:
        return known[wanted]
    if (file := Path(wanted).expanduser()).is_file():
        return read_template(file)
    fix = f"give a file or one of {', '.join(known)}"
    raise UserError(f"model.chat_template: {wanted}: neither a file nor a template of the model: {fix}")


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


def continue_thought(opened: re.Match[str] | None, message: Message, answer: str, variables: Set[str]) -> str:
    """An answer to a prompt that ends with <think>: the rest of the thought, </think> and the answer.

    Without a thought, the model closes it at once; after an empty one, <think></think>, a thought is refused.
    """
    if opened is None:
        return answer
    opening, space, content = opened["opening"], opened["space"], message.get("content", "")
    closing, gap = CLOSINGS.get(opening, f"</{opening[1:]}"), "" if opening in CLOSINGS else "\n"
    thought, (said, closes, rest) = message.get("reasoning_content", ""), content.rpartition(closing)
    if opened["closed"]:
        if (thought + said).strip():
            names = " or ".join(sorted(name for name in variables if "think" in name)) or "a variable"
            fix = f"set {names} to match the answers, in data.template_args or each record's chat_template_kwargs"
            raise TemplateRefusal(f"the answer has a thought, but the prompt ends with a closed one: {fix}")
        return answer
    if answer.startswith(closing):  # the template closes the thought: there is none
        return answer
    if closes and not answer.startswith(opening):  # the template removes the thought
        answer = content[: len(content) - len(rest.lstrip())].lstrip() + answer
    if closes or answer.startswith(opening):
        return answer.removeprefix(opening).removeprefix(space)
    return thought.strip("\n") + gap + closing + 2 * gap + answer
