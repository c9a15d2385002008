"""Chat messages to token ids, and which of those ids are targets.

A chat model never sees messages; it sees one string that a template rendered from them. Training must render exactly as
inference does, and the loss must cover exactly what the model has to produce: each assistant turn and the token that
ends it. Both come from rendering, never from searching the text for markers:

    before = render(messages[:i], add_generation_prompt=True)      the prompt
    after  = render(messages[:i + 1])                              the prompt, answered

`before` must be a prefix of `after`, and `after`, up to the end of the turn, a prefix of the whole conversation; the
target is what lies between. The marks of a template with {% generation %} are used, and verified in the same way. A
template that rewrites history (it drops earlier reasoning) breaks the second condition: then each assistant turn
becomes a sample of its own, rendered as at inference.

What a template puts around an answer is learned once, by rendering a placeholder as the answer: an empty thought before
it (<think></think>) is not a target, and the turn ends with the first control token after it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data import tokenizer_files
from nanoft.data.formats import TRAINING_FIELDS
from nanoft.data.formats import Message as Message
from nanoft.data.template_sandbox import COMPILE_ERRORS, TEMPLATE_ERRORS, BoundedEnvironment, find_marks
from nanoft.data.tokenizer_files import BREAK, PLACEHOLDER, SPECIAL_TOKENS, as_user_error, token_text

# For a base model without a template: ChatML as plain text, since the model does not have ChatML's tokens; a turn ends
# with the end-of-sequence token.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EMPTY_THOUGHT = re.compile(r"\s*<(\w+)>\s*</\1>\s*")  # <think></think>
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # variables of every template
CANNOT_ENCODE = "tokenizer.json: this tokenizer cannot encode the text"
BATCH = 128  # texts handed to the tokenizer's threads together


class TemplateRefusal(UserError):
    """The chat template cannot render these messages, or not in a way that can be trained on."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the character spans in it that are targets."""

    text: str
    spans: list[tuple[int, int]]
    record: int
    turns: list[int] = field(default_factory=list)  # the message of each span


class _FullRendering(NamedTuple):
    messages: list[Message]  # cleaned
    tools: Any
    text: str
    marks: list[tuple[int, int]]


class ChatTokenizer:
    """A model's tokenizer and chat template, read from its directory without transformers."""

    directory: Path | None = None
    added_ids: tuple[int, ...] = ()  # of model.add_tokens

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        template: str | None,
        stop_ids: Iterable[int] = (),
        template_args: Mapping[str, Any] | None = None,  # more variables of the template: enable_thinking
    ):
        self.tokenizer, self.template_args = tokenizer, dict(template_args or {})
        self.template = template or DEFAULT_TEMPLATE
        self.has_own_template = template is not None
        tokens = {key: token_text(settings.get(key)) for key in SPECIAL_TOKENS}
        self.special = {key: text for key, text in tokens.items() if text is not None}
        ids = {key: tokenizer.token_to_id(text) for key, text in self.special.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = next(i for i in (ids.get("pad_token"), self.eos_id, 0) if i is not None)
        first = tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.wants_bos = self.bos_id is not None and first == [self.bos_id]  # its post-processor adds it
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.control_texts = sorted((text for text in special if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self.control_texts)) or "(?!)")
        self._breakable = re.compile("|".join(re.escape(t) for t in self.control_texts if len(t) > 1) or "(?!)")
        self._widths = tokenizer_files.byte_widths(tokenizer)
        self._shortest = min((len(text) for text in self.control_texts if len(text) > 1), default=0)
        self.date = datetime.datetime.now()  # what strftime_now returns
        self._environment = BoundedEnvironment(lambda: self.date)
        self._compiled = self._environment.compile_bounded(self.template)
        self._lead, self._tail = self._probe_template()
        self._has_empty_thought = bool(EMPTY_THOUGHT.fullmatch(self._lead))
        self.turn_end = self._control.search(self._tail)
        end_id = tokenizer.token_to_id(self.turn_end[0]) if self.turn_end else None
        self.stop_ids = sorted({*stop_ids, *(i for i in (end_id, self.eos_id) if i is not None)})

    @classmethod
    def from_directory(
        cls, directory: Path, template_args: Mapping[str, Any] | None = None, add_tokens: Sequence[str] = ()
    ) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
        if taken := sorted(set(template_args or ()) & {*RESERVED, *SPECIAL_TOKENS}):
            raise UserError(f"data.template_args: {taken[0]}: is set by nanoft: remove it")
        tokenizer = tokenizer_files.read_tokenizer(directory)
        added_ids = tokenizer_files.add_tokens(tokenizer, add_tokens)
        settings, template, stop_ids = tokenizer_files.read_settings(directory)
        try:
            chat = cls(tokenizer, settings, template, stop_ids, template_args)
        except COMPILE_ERRORS as error:
            raise UserError(f"{directory}: the chat template is not valid: {error}") from None
        chat.directory, chat.added_ids = directory, added_ids
        return chat

    def fingerprint(self) -> str:
        """Everything that ids depend on: the tokenizer, the template, its variables, and its date if it prints one."""
        date = self.date.date().isoformat() if "strftime_now" in self.template else ""
        variables = json.dumps([self.template, self.template_args, self.special, date], sort_keys=True, default=str)
        return variables + hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None) -> str:
        """The string that the model sees; raises TemplateRefusal."""
        return find_marks(self._render(self._clean(messages), add_generation_prompt, self._escape(tools)))[0]

    def render_prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        return self.render(messages, add_generation_prompt=True, tools=tools)

    def render_samples(
        self, messages: Sequence[Message], record: int, tools: Any = None, train_on: str = "assistant"
    ) -> list[Rendered]:
        """A conversation as one text with a span for each assistant turn; several texts if history is rewritten.

        Args:
            train_on: `assistant`: every assistant turn; `last_assistant`: the last one; `all`: everything. An assistant
                message with `weight: 0` or `train: false` is never a target.
        Raises:
            TemplateRefusal: the template cannot be used for training on this conversation.
        """
        cleaned, escaped = self._clean(messages), self._escape(tools)
        full = _FullRendering(cleaned, escaped, *find_marks(self._render(cleaned, False, escaped)))
        if tools or any("tool_calls" in message for message in messages):
            self._check_tools(full.text, messages, tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            excluded = [self._turn(full, index) for index in answers if not is_trained(messages[index])]
            if not all(full.text.startswith(after[:end]) for after, (_, end) in excluded):
                raise TemplateRefusal("the chat template rewrites earlier turns: use data.train_on=assistant")
            edges = [0, *itertools.chain.from_iterable(span for _, span in excluded), len(full.text)]
            between = zip(edges[::2], edges[1::2], strict=True)
            return [Rendered(full.text, [(start, end) for start, end in between if start < end], record)]
        turns = [i for i in (answers[-1:] if train_on == "last_assistant" else answers) if is_trained(messages[i])]
        pieces = [self._turn(full, index) for index in turns]
        if all(after is full.text or full.text.startswith(after[:end]) for after, (_, end) in pieces):
            return [Rendered(full.text, [span for _, span in pieces], record, turns)]
        return [Rendered(after, [span], record, [turn]) for turn, (after, span) in zip(turns, pieces, strict=True)]

    def text_sample(self, text: str, record: int) -> Rendered:
        """Plain text, ended by the end-of-sequence token: everything is a target."""
        ended = self._escape(text) + self.special.get("eos_token", "")
        return Rendered(ended, [(0, len(ended))], record)

    def _clean(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that the template gets: control tokens escaped, without null values and training fields."""
        kept = ({k: v for k, v in m.items() if v is not None and k not in TRAINING_FIELDS} for m in messages)
        return [self._escape(message) for message in kept]

    def _render(self, cleaned: list[Message], add_generation_prompt: bool, tools: Any) -> str:
        try:
            given = {"messages": cleaned, "tools": tools or None, "documents": None}
            given |= {"add_generation_prompt": add_generation_prompt, **self.special, **self.template_args}
            return self._environment.render(self._compiled, **given)
        except TEMPLATE_ERRORS as error:
            raise TemplateRefusal(f"the chat template refuses these messages: {error}") from None

    def _turn(self, full: _FullRendering, index: int) -> tuple[str, tuple[int, int]]:
        """A text that begins with everything up to turn `index`, and the span of that turn's targets in it."""
        before = find_marks(self._render(full.messages[:index], True, full.tools))[0]
        if not full.marks and (end := self._verbatim(full, index, before)):
            return full.text, (self._start_of_turn(full.text, len(before), full.messages[index]), end)
        after, marks = full.text, full.marks
        if index < len(full.messages) - 1:
            after, marks = find_marks(self._render(full.messages[: index + 1], False, full.tools))
        if not after.startswith(before):
            raise TemplateRefusal("the chat template renders an answered prompt that does not start with the prompt")
        marked = [mark for mark in marks if mark[1] > len(before)]
        if marked:  # the marked span, extended to the token that ends the turn
            start, end = max(marked[0][0], len(before)), marked[-1][1]
            inside = len(after[:end].rstrip())
            if any(after.endswith(control, start, inside) for control in self.control_texts):
                end = inside
            elif following := self._control.match(after, end):
                end = following.end()
        else:
            start = self._start_of_turn(after, len(before), full.messages[index])
            end = self._end_of_turn(after, len(before))
        if not after[start:end].strip():
            raise TemplateRefusal("the chat template omits the answer: there are no target tokens")
        return after, (start, end)

    def _verbatim(self, full: _FullRendering, index: int, before: str) -> int:
        """Where the turn ends, if just the answer and its end follow the prompt: saves a rendering; else 0."""
        content = full.messages[index].get("content", "")
        ending = self._tail[: self.turn_end.end()] if self.turn_end else ""
        if ending and content and full.text.startswith(before):
            for answer in (content, content.strip()):
                if answer and full.text.startswith(self._lead + answer + ending, len(before)):
                    return len(before) + len(self._lead) + len(answer) + len(ending)
        return 0

    def _start_of_turn(self, text: str, start: int, message: Message) -> int:
        """After an empty thought that the template puts before every answer, unless the message itself has one."""
        injected = self._has_empty_thought and text.startswith(self._lead, start)
        said = message.get("content", "").lstrip().startswith(self._lead.strip())
        return start + len(self._lead) if injected and not said else start

    def _end_of_turn(self, text: str, start: int) -> int:
        """After the token that ends the turn; what a template adds to it (a newline) is not a target."""
        if self._tail and text.endswith(self._tail):
            first = self.turn_end.end() if self.turn_end else len(self._tail.rstrip())
            return len(text) - len(self._tail) + first
        ends = [match.end() for match in self._control.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text.rstrip())

    def _probe_template(self) -> tuple[str, str]:
        """What the template puts between the prompt and an answer, and after the answer."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACEHOLDER}]
        try:
            before, after = self.render_prompt(messages[:1]), self.render(messages)
        except TemplateRefusal:
            return "", ""
        lead, answer, tail = after[len(before) :].partition(PLACEHOLDER)
        return (lead, tail) if after.startswith(before) and answer else ("", "")

    def _check_tools(self, rendered: str, messages: Sequence[Message], tools: Any) -> None:
        """Refuse a template that silently omits tools or their calls."""
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        for what, other, offered in (("tool_calls", plain, tools), ("tools", messages, None)):
            if (other, offered) == (messages, tools):
                continue  # has none of these
            without = None
            with contextlib.suppress(TemplateRefusal):  # it needs them
                without = self.render(other, tools=offered)
            if without == rendered:
                raise TemplateRefusal(f"the chat template omits {what}: it does not support tools")

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The ids of a prompt; a prefix of those that the model was trained on."""
        ids = self._ids(self.render_prompt(messages, tools))
        return [self.bos_id or 0, *ids] if self.wants_bos and ids[:1] != [self.bos_id] else ids

    def encode(self, rendered: Iterable[Rendered]) -> Iterator[Sample]:
        """Encode texts; the tokenizer's threads encode one batch while the next ones are being rendered."""
        with ThreadPoolExecutor(2) as pool:  # one may wait for the GIL while the other keeps all cores busy
            under_way: deque[tuple[list[Rendered], Any]] = deque()
            items = iter(rendered)
            while (batch := list(itertools.islice(items, BATCH))) or under_way:
                if batch:
                    under_way.append((batch, pool.submit(self._encode_batch, [item.text for item in batch])))
                if not batch or len(under_way) > 4:
                    oldest, encodings = under_way.popleft()
                    yield from self._samples(oldest, encodings.result())

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def highlight_targets(self, sample: Sample, color: bool) -> str:
        """The text of a sample, its targets green among dim text in a terminal, otherwise in brackets."""
        changes = np.flatnonzero(np.diff(sample.is_target)) + 1
        pieces = []
        for start, end in itertools.pairwise([0, *changes.tolist(), len(sample.ids)]):
            text = self.decode(sample.ids[start:end].tolist(), keep_special=True)
            plain, colored = ("⟦{}⟧", "\033[32m{}\033[0m") if sample.is_target[start] else ("{}", "\033[2m{}\033[0m")
            pieces.append((colored if color else plain).format(text))
        return "".join(pieces)

    def _encode_batch(self, texts: list[str]) -> list[Encoding]:
        # The fast one gives no character offsets: then they follow from the tokens' widths.
        encode = self.tokenizer.encode_batch if self._widths is None else self.tokenizer.encode_batch_fast
        with as_user_error(CANNOT_ENCODE):
            return encode(texts, add_special_tokens=False)

    def _encode(self, text: str) -> Encoding:  # ids, with each token's character offsets
        with as_user_error(CANNOT_ENCODE):
            return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_now(self, rendered: list[Rendered]) -> list[Sample]:
        """Encode a few texts, without threads."""
        return list(self._samples(rendered, self._encode_batch([item.text for item in rendered])))

    def _samples(self, batch: list[Rendered], encodings: list[Encoding]) -> Iterator[Sample]:
        for item, encoded in zip(batch, encodings, strict=True):
            ids = np.array(encoded.ids, dtype=np.int32)
            ends = self._ends(item.text, ids)
            if self._widths is not None and ends is None:
                encoded = self._encode(item.text)
            edges = [[_edge(item.text, encoded, ends, at) for at in span] for span in item.spans]
            if item.turns and any(is_inside for (_, is_inside), _ in edges):
                yield from map(self._sample_of_turn, itertools.repeat(item), item.spans, item.turns)
                continue
            is_target = np.zeros(len(ids), dtype=np.bool_)
            for (first, _), (last, is_inside) in edges:
                is_target[first : last + is_inside] = True
            if BREAK in item.text:  # its tokens are dropped
                kept = np.array([item.text[start:end] != BREAK for start, end in encoded.offsets], dtype=np.bool_)
                ids, is_target = ids[kept], is_target[kept]
            yield self._with_bos(ids, is_target, item.record, item.turns[0] if len(item.turns) == 1 else None)

    def _ends(self, text: str, ids: Any) -> Any:
        """(n,) where each token ends, in bytes, from the tokens' widths; None if only the library knows."""
        if self._widths is None or BREAK in text:
            return None
        ends = np.cumsum(self._widths[ids])
        return ends if len(ends) and ends[-1] == len(text.encode()) else None

    def _sample_of_turn(self, item: Rendered, span: tuple[int, int], turn: int) -> Sample:
        """A turn whose first token would merge with the prompt: both are encoded separately, as at inference."""
        start, end = span
        prompt = self._ids(item.text[:start])
        broken = item.text[:start] + BREAK + item.text[start:end]
        ids = np.array(prompt + self._ids(broken, after=start), dtype=np.int32)
        return self._with_bos(ids, np.arange(len(ids)) >= len(prompt), item.record, turn)

    def _ids(self, text: str, after: int = -1) -> list[int]:
        """The ids of a text, without those of BREAK; only of tokens that begin after a character."""
        encoded = self._encode(text)
        if BREAK not in text:
            return encoded.ids
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return [token for token, (start, end) in pairs if start > after and text[start:end] != BREAK]

    def _with_bos(self, ids: Any, is_target: Any, record: int, turn: int | None) -> Sample:
        if self.wants_bos and (not len(ids) or ids[0] != self.bos_id):
            ids, is_target = np.append(np.int32(self.bos_id or 0), ids), np.append(False, is_target)
        if len(is_target):
            is_target[0] = False  # nothing predicts the first token
        return Sample(ids, is_target, record, turn)

    def _escape(self, value: Any) -> Any:
        """Break up control tokens that occur in the texts of a message, however deep."""
        if isinstance(value, dict):
            return {self._escape(key): self._escape(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._escape(part) for part in value]
        while isinstance(value, str) and len(value) >= self._shortest and self._breakable.search(value):
            value = self._breakable.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        return value


def is_trained(message: Message) -> bool:
    """Whether a message may be a target, by OpenAI's field `weight` and axolotl's `train`."""
    return bool(message.get("train", True)) and message.get("weight", 1) != 0


def _edge(text: str, encoded: Encoding, ends: Any, character: int) -> tuple[int, bool]:
    """The first token at or after a character, and whether it is one that begins before the character and contains it.

    Of several tokens that encode one character, the first is taken.
    """
    if ends is not None:  # where each token ends, in bytes
        byte = character if text.isascii() else len(text[:character].encode())
        at = int(np.searchsorted(ends, byte, side="right"))
        return at, byte != (ends[at - 1] if at else 0)
    token = encoded.char_to_token(character)
    if token is not None:
        start = encoded.token_to_chars(token)
        return token, start is not None and start[0] < character
    after = (at for at, (start, _) in enumerate(encoded.offsets) if start >= character)
    return next(after, len(encoded)), False
