"""Text to token ids, and which of those ids the model is to learn.

A chat model never sees messages; it sees one string that a template rendered from them. Fine-tuning works when training
renders exactly as use does, and when the loss covers exactly what the model must produce: each assistant turn and the
token that ends it. Both come from rendering, never from searching the text for markers:

    before = render(messages[:i], add_generation_prompt=True)      what the model is given
    after  = render(messages[:i + 1])                              the same, answered

`before` must be a prefix of `after`, and `after`, up to the end of the turn, a prefix of the whole conversation; what
lies between is the target. A template that marks what the assistant says with {% generation %} has its marks used, and
the same is verified. A template that rewrites history (it drops earlier reasoning, or moves the system text to the last
turn) breaks the second condition: then each assistant turn becomes a sample of its own, rendered as it will be in use.

What a template puts around an answer is learned once, by rendering an answer of one character that no text contains:
an empty thought before it that nobody said (<think></think>) is not a target, and the turn ends with the first control
token behind it, whatever else follows.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.template_sandbox import (
    CLOSING,
    COMPILE_ERRORS,
    MAX_SOURCE,
    OPENING,
    TEMPLATE_ERRORS,
    BoundedEnvironment,
    find_marks,
)
from nanoft.io.untrusted import read_bytes, read_json, refuse_code

Message = dict[str, Any]
# For a base model that has no template: ChatML's look without its tokens, which such a model does not have; the
# turn ends on the end-of-sequence token, which every model has.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Two more noncharacters: one splits a control token that a user wrote, so that it stays text; one is an answer.
BREAK, ANSWER = "\ufdd0", "\ufdd3"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
EMPTY_THOUGHT = re.compile(r"\s*<(\w+)>\s*</\1>\s*")  # <think></think>
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # to every template
OUR_FIELDS = ("train", "weight")  # of a message: whether it is learned; no template's business
MAX_TOKENIZER = 100 << 20  # bytes of a tokenizer.json; the largest in use have 33 MB
MAX_ID = 1 << 22  # of a token; the largest vocabularies have 2^18
MAX_SPECIAL = 20_000  # control tokens; each is looked for in every text
MAX_GROWTH = 64  # how many times longer a normalizer or a decoder may make a text
CANNOT_ENCODE = "tokenizer.json: a text that this tokenizer cannot encode"
ENCODE_AT_ONCE = 128  # texts handed to the tokenizer's threads together


class TemplateRefusal(UserError):
    """The chat template cannot render these messages, or not so that they can be learned."""


@dataclass(frozen=True)
class Rendered:
    """A text and the character spans in it that are targets."""

    text: str
    spans: list[tuple[int, int]]
    record: int
    turns: list[int] = field(default_factory=list)  # the messages that the spans belong to

    @property
    def turn(self) -> int | None:
        return self.turns[0] if len(self.turns) == 1 else None


class ChatTokenizer:
    """A model's tokenizer and chat template, read from its directory without transformers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        template: str | None,
        stop_ids: Iterable[int] = (),
        template_args: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            template_args: more variables for the template, for example enable_thinking.
        """
        self.tokenizer, self.settings, self.template_args = tokenizer, settings, dict(template_args or {})
        self.template = template or DEFAULT_TEMPLATE
        self.has_own_template = template is not None
        tokens = {key: _token_text(settings.get(key)) for key in SPECIAL_TOKENS}
        self.special = {key: text for key, text in tokens.items() if text is not None}
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        self.pad_id = next(i for i in (self._id("pad_token"), self.eos_id, 0) if i is not None)
        self.wants_bos = self._wants_bos()
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.control_texts = sorted((text for text in special if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self.control_texts)) or "(?!)")
        self._breakable = re.compile("|".join(re.escape(t) for t in self.control_texts if len(t) > 1) or "(?!)")
        self._widths = byte_widths(tokenizer)
        self._shortest = min((len(text) for text in self.control_texts if len(text) > 1), default=0)
        self.date = datetime.datetime.now()  # the clock of this run's templates
        self._environment = BoundedEnvironment(lambda: self.date)
        self._compiled = self._environment.compile_bounded(self.template)
        self._lead, self._tail, ending = self._frame()
        self._has_empty_thought = bool(EMPTY_THOUGHT.fullmatch(self._lead))
        self.turn_end = self._control.search(ending)
        end_id = tokenizer.token_to_id(self.turn_end[0]) if self.turn_end else None
        self.stop_ids = sorted({*stop_ids, *(i for i in (end_id, self.eos_id) if i is not None)})

    @classmethod
    def from_directory(cls, directory: Path, template_args: Mapping[str, Any] | None = None) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

        Raises:
            UserError: no tokenizer.json, or a file that is not valid.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file: a model needs its tokenizer.json")
        with _explained(f"{path}: not a valid tokenizer"):
            tokenizer = Tokenizer.from_buffer(read_bytes(path, MAX_TOKENIZER))
            tokenizer.no_truncation()  # some files say so: here nothing is cut or padded but by nanoft's own rules
            tokenizer.no_padding()
            _check_tokenizer(tokenizer)
        settings = _read_optional(directory / "tokenizer_config.json")
        try:
            refuse_code(settings)
        except UserError as error:
            raise UserError(f"{directory / 'tokenizer_config.json'}: {error}") from None
        stops = _read_optional(directory / "generation_config.json").get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        if not all(type(stop) is int and 0 <= stop < MAX_ID for stop in stops):
            raise UserError(f"{directory / 'generation_config.json'}: eos_token_id: expected ids, found {stops!r:.60}")
        for key in SPECIAL_TOKENS:
            if not isinstance(_token_text(settings.get(key)), str | None):
                raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: expected a text: {settings[key]!r:.60}")
        template = _find_template(directory, settings)
        if taken := sorted(set(template_args or ()) & {*GIVEN, *SPECIAL_TOKENS}):
            raise UserError(f"data.template_args: {taken[0]}: every template is given this already: leave it out")
        try:
            return cls(tokenizer, settings, template, stops, template_args)
        except COMPILE_ERRORS as error:
            raise UserError(f"{directory}: the chat template is not valid: {error}") from None

    def identity(self) -> str:
        """Everything that ids depend on, as a text: the tokenizer, the template, what it is given, and its date."""
        date = self.date.date().isoformat() if "strftime_now" in self.template else ""
        given = json.dumps([self.template, self.template_args, self.special, date], sort_keys=True, default=str)
        return given + hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    # ---- Messages to text

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None) -> str:
        """Messages to the one string that the model sees.

        Raises:
            TemplateRefusal: the template refuses these messages, or is broken.
        """
        return find_marks(self._render(self._clean(messages), add_generation_prompt, self._defuse(tools)))[0]

    def render_prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """What the model is given when it is to answer `messages`."""
        return self.render(messages, add_generation_prompt=True, tools=tools)

    def render_samples(
        self, messages: Sequence[Message], record: int, tools: Any = None, train_on: str = "assistant"
    ) -> list[Rendered]:
        """A conversation as one text with a span for each assistant turn; several texts if history is rewritten.

        Args:
            train_on: `assistant`: every assistant turn; `last_assistant`: the last one; `all`: everything. An assistant
                message with `weight: 0` or `train: false` is left out.
        Raises:
            TemplateRefusal: the template cannot be used for training on this conversation.
        """
        talk = _Talk(self, self._clean(messages), self._defuse(tools))
        if tools or any("tool_calls" in message for message in messages):
            self._check_tools(talk.text, messages, tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            left_out = [self._turn(talk, index) for index in answers if not is_trained(messages[index])]
            if not all(talk.text.startswith(after[:end]) for after, (_, end) in left_out):
                raise TemplateRefusal(
                    "the chat template rewrites earlier turns: data.train_on=all cannot leave one out"
                )
            return [Rendered(talk.text, _complement([span for _, span in left_out], len(talk.text)), record)]
        turns = [i for i in (answers[-1:] if train_on == "last_assistant" else answers) if is_trained(messages[i])]
        pieces = [self._turn(talk, index) for index in turns]
        if all(after is talk.text or talk.text.startswith(after[:end]) for after, (_, end) in pieces):
            return [Rendered(talk.text, [span for _, span in pieces], record, turns)]
        return [Rendered(after, [span], record, [turn]) for turn, (after, span) in zip(turns, pieces, strict=True)]

    def text_sample(self, text: str, record: int) -> Rendered:
        """Plain text: everything is a target, and the end of the text is marked."""
        ended = self._defuse(text) + self.special.get("eos_token", "")
        return Rendered(ended, [(0, len(ended))], record)

    def _clean(self, messages: Sequence[Message]) -> list[Message]:
        """What a template is to see of messages: no control tokens in texts, nothing absent, nothing about training."""
        return [
            {key: self._defuse(value) for key, value in message.items() if value is not None and key not in OUR_FIELDS}
            for message in messages
        ]

    def _render(self, cleaned: list[Message], add_generation_prompt: bool, tools: Any) -> str:
        """The text, with generation marks if the template has any."""
        try:
            return self._environment.render(
                self._compiled,
                **self.template_args,
                messages=cleaned,
                add_generation_prompt=add_generation_prompt,
                tools=tools or None,
                documents=None,
                **self.special,
            )
        except TEMPLATE_ERRORS as error:
            raise TemplateRefusal(f"the chat template refuses these messages: {error}") from None

    def _turn(self, talk: _Talk, index: int) -> tuple[str, tuple[int, int]]:
        """A text that begins with everything up to turn `index`, and where in it that turn's targets lie."""
        before = find_marks(self._render(talk.messages[:index], True, talk.tools))[0]
        if not talk.marks and (end := self._verbatim(talk, index, before)):
            return talk.text, (self._start_of_turn(talk.text, len(before), talk.messages[index]), end)
        after, marks = talk.text, talk.marks
        if index < len(talk.messages) - 1:
            after, marks = find_marks(self._render(talk.messages[: index + 1], False, talk.tools))
        if not after.startswith(before):
            raise TemplateRefusal(
                "the chat template cannot be trained with: rendering the answered prompt does not start with the prompt"
            )
        marked = [mark for mark in marks if mark[1] > len(before)]
        if marked:
            start, end = self._complete(after, max(marked[0][0], len(before)), marked[-1][1])
        else:
            start = self._start_of_turn(after, len(before), talk.messages[index])
            end = self._end_of_turn(after, len(before))
        if not after[start:end].strip():
            raise TemplateRefusal("the chat template leaves the answer out: there is nothing to learn")
        return after, (start, end)

    def _verbatim(self, talk: _Talk, index: int, before: str) -> int:
        """Where the turn ends, if the whole text goes on behind the prompt with exactly the answer and its end; else 0.

        This is so in most templates, and saves rendering the conversation up to each of its answers.
        """
        content = talk.messages[index].get("content", "")
        ending = self._tail[: self.turn_end.end()] if self.turn_end else ""
        if ending and content and talk.text.startswith(before):
            for answer in (content, content.strip()):
                if answer and talk.text.startswith(self._lead + answer + ending, len(before)):
                    return len(before) + len(self._lead) + len(answer) + len(ending)
        return 0

    def _start_of_turn(self, text: str, start: int, message: Message) -> int:
        """Behind an empty thought that the template puts before every answer, unless this message says it itself."""
        injected = self._has_empty_thought and text.startswith(self._lead, start)
        said = message.get("content", "").lstrip().startswith(self._lead.strip())
        return start + len(self._lead) if injected and not said else start

    def _end_of_turn(self, text: str, start: int) -> int:
        """Behind the token that ends the turn; what a template puts after it (a newline) is nobody's to say."""
        if self._tail and text.endswith(self._tail):
            first = self.turn_end.end() if self.turn_end else len(self._tail.rstrip())
            return len(text) - len(self._tail) + first
        ends = [match.end() for match in self._control.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text.rstrip())

    def _complete(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span with the token that ends the turn, wherever the mark ends."""
        inside = len(text[:end].rstrip())
        if any(text.endswith(control, start, inside) for control in self.control_texts):
            return start, inside
        following = self._control.match(text, end)
        return start, following.end() if following else end

    def _frame(self) -> tuple[str, str, str]:
        """(lead, tail, tail): what the template puts between the prompt and an answer, and behind the answer."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            before, after = self.render_prompt(messages[:1]), self.render(messages)
        except TemplateRefusal:
            return "", "", ""
        lead, answer, tail = after[len(before) :].partition(ANSWER)
        return (lead, tail, tail) if after.startswith(before) and answer else ("", "", "")

    def _check_tools(self, whole: str, messages: Sequence[Message], tools: Any) -> None:
        """Whoever trains on tool calls must see them in the text; many templates leave them out silently."""
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        for what, other, offered in (("tool_calls", plain, tools), ("tools", messages, None)):
            if (other, offered) != (messages, tools):
                same = False
                with contextlib.suppress(TemplateRefusal):  # without them it does not even render: it uses them
                    same = self.render(other, tools=offered) == whole
                if same:
                    raise TemplateRefusal(f"the chat template leaves {what} out: it is not made for tools")

    # ---- Text to ids

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The ids that the model is given when it is to answer `messages`; a prefix of what it was trained on."""
        return self._first_bos(self._ids(self.render_prompt(messages, tools)))

    def encode(self, rendered: Iterable[Rendered]) -> Iterator[Sample]:
        """Texts to samples; the tokenizer's threads encode one batch while the next ones are being rendered."""
        with ThreadPoolExecutor(2) as pool:  # while one waits for Python's lock, the other has work for all threads
            under_way: deque[tuple[list[Rendered], Any]] = deque()
            for batch in _batches(rendered, ENCODE_AT_ONCE):
                under_way.append((batch, pool.submit(self._encode_batch, [item.text for item in batch])))
                if len(under_way) > 4:
                    batch, encodings = under_way.popleft()
                    yield from self._samples(batch, encodings.result())
            for batch, encodings in under_way:
                yield from self._samples(batch, encodings.result())

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def mark(self, sample: Sample, color: bool) -> str:
        """A sample as the model sees it, its targets marked: green among dim text in a terminal, else in brackets."""
        changes = np.flatnonzero(np.diff(sample.is_target)) + 1
        pieces = []
        for start, end in itertools.pairwise([0, *changes.tolist(), len(sample.ids)]):
            text = self.decode(sample.ids[start:end].tolist(), keep_special=True)
            if color:
                pieces.append(f"\033[{32 if sample.is_target[start] else 2}m{text}\033[0m")
            else:
                pieces.append(f"⟦{text}⟧" if sample.is_target[start] else text)
        return "".join(pieces)

    def _encode_batch(self, texts: list[str]) -> list[Encoding]:
        """Ids; with each token's place in the text, unless it can be told from the tokens' widths."""
        encode = self.tokenizer.encode_batch if self._widths is None else self.tokenizer.encode_batch_fast
        with _explained(CANNOT_ENCODE):
            return encode(texts, add_special_tokens=False)

    def _encode(self, text: str) -> Encoding:
        """Ids, with each token's place in the text."""
        with _explained(CANNOT_ENCODE):
            return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_now(self, rendered: list[Rendered]) -> list[Sample]:
        """A few texts to samples, at once."""
        return list(self._samples(rendered, self._encode_batch([item.text for item in rendered])))

    def _samples(self, batch: list[Rendered], encodings: list[Encoding]) -> Iterator[Sample]:
        for item, encoded in zip(batch, encodings, strict=True):
            ids = np.array(encoded.ids, dtype=np.int32)
            ends = self._ends(item.text, ids)
            if self._widths is not None and ends is None:
                encoded = self._encode(item.text)  # with places, for once
            edge = functools.partial(_edge, encoded) if ends is None else _edge_by_width(item.text, ends)
            edges = [(edge(start), edge(end)) for start, end in item.spans]
            if item.turns and any(is_inside for (_, is_inside), _ in edges):
                yield from map(self._sample_of_turn, itertools.repeat(item), item.spans, item.turns)
            else:
                spans = [(first, last + inside) for (first, _), (last, inside) in edges]
                yield self._sample(item, ids, encoded, spans)

    def _ends(self, text: str, ids: Any) -> Any:
        """(n,) where each token ends, in bytes, if the widths of the tokens tell; None if only the library can."""
        if self._widths is None or BREAK in text:
            return None
        ends = np.cumsum(self._widths[ids])
        size = len(text) if text.isascii() else len(text.encode())
        return ends if len(ends) and ends[-1] == size else None

    def _sample(self, item: Rendered, ids: Any, encoded: Encoding, spans: list[tuple[int, int]]) -> Sample:
        """The sample of a text whose targets are the tokens of `spans`."""
        is_target = np.zeros(len(ids), dtype=np.bool_)
        for first, last in spans:
            is_target[first:last] = True
        if BREAK in item.text:  # its own tokens have done their work
            kept = np.array([item.text[start:end] != BREAK for start, end in encoded.offsets], dtype=np.bool_)
            ids, is_target = ids[kept], is_target[kept]
        return self._with_bos(ids, is_target, item.record, item.turn)

    def _sample_of_turn(self, item: Rendered, span: tuple[int, int], turn: int) -> Sample:
        """A turn whose first token would swallow the prompt's last characters: prompt and answer are encoded apart.

        In use the model is given the ids of the prompt alone, so these are the ids that it is trained on.
        """
        start, end = span
        prompt = self._ids(item.text[:start])
        text = item.text[:start] + BREAK + item.text[start:end]
        encoded = self._encode(text)
        answer = [
            token
            for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True)
            if first > start and text[first:last] != BREAK
        ]
        ids = np.array(prompt + answer, dtype=np.int32)
        return self._with_bos(ids, np.arange(len(ids)) >= len(prompt), item.record, turn)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text, without those that only keep control tokens apart."""
        encoded = self._encode(text)
        if BREAK not in text:
            return encoded.ids
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return [token for token, (start, end) in pairs if text[start:end] != BREAK]

    def _first_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS, if the tokenizer wants one."""
        wanted = self.wants_bos and ids[:1] != [self.bos_id]
        return [self.bos_id or 0, *ids] if wanted else ids

    def _with_bos(self, ids: Any, is_target: Any, record: int, turn: int | None) -> Sample:
        if self.wants_bos and (not len(ids) or ids[0] != self.bos_id):
            ids, is_target = np.append(np.int32(self.bos_id or 0), ids), np.append(False, is_target)
        if len(is_target):
            is_target[0] = False  # nothing stands before the first token, so nothing predicts it
        return Sample(ids, is_target, record, turn)

    def _defuse(self, value: Any) -> Any:
        """Break up control tokens that stand in a message's own texts, however deep."""
        if isinstance(value, str):
            while len(value) >= self._shortest and self._breakable.search(value):
                value = self._breakable.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
            return value
        if isinstance(value, dict):
            return {self._defuse(key): self._defuse(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._defuse(part) for part in value]
        return value

    def _id(self, key: str) -> int | None:
        text = self.special.get(key)
        return None if text is None else self.tokenizer.token_to_id(text)

    def _wants_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS first: its post-processor decides."""
        with_specials = self.tokenizer.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and with_specials[:1] == [self.bos_id]


def byte_widths(tokenizer: Tokenizer) -> np.ndarray[Any, Any] | None:
    """(vocabulary,) the bytes of text that each token stands for; None if only the tokenizer knows.

    A byte-level BPE (GPT-2, Llama 3) spells each byte with one character and changes nothing, so the places of its
    tokens follow from their widths; to have the library track them makes it a third slower.
    """
    changes = tokenizer.normalizer is not None or not isinstance(tokenizer.decoder, decoders.ByteLevel)
    added = tokenizer.get_added_tokens_decoder()
    if (
        changes
        or "add_prefix_space=True" in str(tokenizer.pre_tokenizer)
        or any(t.lstrip or t.rstrip for t in added.values())
    ):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        widths[number] = len(added[number].content.encode()) if number in added else len(token)
    return widths


def is_trained(message: Message) -> bool:
    """Whether a message's own fields let it be learned: OpenAI's `weight`, axolotl's `train`."""
    return bool(message.get("train", True)) and message.get("weight", 1) != 0


def _edge(encoded: Encoding, character: int) -> tuple[int, bool]:
    """(the first token at or behind a character, False); if one begins before it and goes on behind it, (that, True).

    A character made of several tokens gives all of them its own start, and the first of them is taken.
    """
    token = encoded.char_to_token(character)
    if token is not None:
        start = encoded.token_to_chars(token)
        return token, start is not None and start[0] < character
    behind = (at for at, (start, _) in enumerate(encoded.offsets) if start >= character)
    return next(behind, len(encoded)), False


def _edge_by_width(text: str, ends: Any) -> Callable[[int], tuple[int, bool]]:
    """The same as `_edge`, from where each token ends."""

    def edge(character: int) -> tuple[int, bool]:
        byte = character if text.isascii() else len(text[:character].encode())
        token = int(np.searchsorted(ends, byte, side="right"))
        return token, byte != (ends[token - 1] if token else 0)

    return edge


def _complement(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What lies between and around the spans."""
    edges = [0, *itertools.chain(*spans), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


class _Talk:
    """A conversation ready to be rendered, and the whole of it rendered."""

    def __init__(self, chat: ChatTokenizer, messages: list[Message], tools: Any):
        self.messages, self.tools = messages, tools
        self.text, self.marks = find_marks(chat._render(messages, False, tools))


def _batches(items: Iterable[Rendered], size: int) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What the tokenizers library raises as a UserError: a bare Exception, and at some files a panic, not even that."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {error}") from None


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse one that would fill the memory or never end, or that cannot encode a letter.

    Raises:
        ValueError: says why; or whatever the library raises.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MAX_ID:
        raise ValueError(f"a token has the number {largest:,}")
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if len(special) > MAX_SPECIAL:
        raise ValueError(f"{len(special):,} control tokens: {MAX_SPECIAL:,} are allowed")
    if reserved := [text for text in special if {OPENING, CLOSING, BREAK, ANSWER} & set(text)]:
        raise ValueError(f"the control token {reserved[0]!r:.60} has a character that is no character")
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"its {type(part).__name__} makes a text more than {MAX_GROWTH} times as long")
    tokenizer.encode("a 1", add_special_tokens=True)


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a text may become by a normalizer or decoder, given as the library writes it."""
    factor = math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
    if part["type"] == "Replace":
        taken = len(part["pattern"].get("String", ""))  # a regular expression, and an empty text, take nothing away
        return max(1, len(part["content"]) / taken if taken else 1 + len(part["content"]))
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    if part["type"] == "Precompiled":  # 4 bytes: the size of a look-up table; that table; texts that end in a zero
        chart = base64.b64decode(part["precompiled_charsmap"])
        return max(map(len, chart[4 + int.from_bytes(chart[:4], "little") :].split(b"\0")))
    return factor


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja beats tokenizer_config.json, whose older form is a list of named templates."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file, 4 * MAX_SOURCE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and "template" in entry]
        named = {str(entry.get("name")): entry["template"] for entry in entries}
        template = named.get("default", next(iter(named.values()), template))
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: chat_template: expected a text, found {template!r:.60}"
        )
    return template
