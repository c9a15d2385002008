"""Text to token ids, and which of those ids the model is to learn.

A chat model never sees messages; it sees one string that a template rendered from them. Fine-tuning works when training
renders exactly as use does, and when the loss covers exactly what the model must produce: each assistant turn and the
token that ends it. Both come from rendering, never from searching the text for markers:

    before = render(messages[:i], add_generation_prompt=True)      what the model is given
    after  = render(messages[:i + 1])                              the same, answered

`before` must be a prefix of `after`, and `after` a prefix of the whole conversation; what lies between is the target. A
template that rewrites history (it drops earlier reasoning, or moves the system text to the last turn) breaks the second
condition: then each assistant turn becomes a sample of its own, rendered as it will be in use.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from nanoft import UserError

Message = dict[str, Any]

# For a base model that has no template: ChatML's look without its tokens, which such a model does not have; the
# turn ends on the end-of-sequence token, which every model has.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{ (eos_token if message.role == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BREAK = "\ue000"  # splits a control token that a user wrote, so that it stays text; a private-use character
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a template's own code can raise; a sandbox escape is a TemplateError.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
ENCODE_AT_ONCE = 1024  # texts handed to the tokenizer's threads together


@dataclass(frozen=True)
class Sample:
    """One training sequence: ids (n,) int32, is_target (n,) bool, and the record it came from."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    is_target: np.ndarray[Any, np.dtype[np.bool_]]
    record: int


@dataclass(frozen=True)
class Rendered:
    """A text and the character spans in it that are targets."""

    text: str
    spans: list[tuple[int, int]]
    record: int


class ChatTokenizer:
    """A model's tokenizer and chat template, read from its directory without transformers."""

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], template: str | None, stop_ids: Iterable[int] = ()
    ):
        self.tokenizer, self.settings = tokenizer, settings
        self.template = template or DEFAULT_TEMPLATE
        self.has_own_template = template is not None
        tokens = {key: _token_text(settings.get(key)) for key in SPECIAL_TOKENS}
        self.special = {key: text for key, text in tokens.items() if text is not None}
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        self.pad_id = next(i for i in (self._id("pad_token"), self.eos_id, 0) if i is not None)
        self.stop_ids = sorted({*stop_ids, *([self.eos_id] if self.eos_id is not None else [])})
        self.wants_bos = self._wants_bos()
        self.control_texts = sorted(
            (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special), key=len
        )
        self.date = datetime.datetime.now()  # the clock of this run's templates
        self._compiled = _environment(lambda: self.date).from_string(self.template)

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

        Raises:
            UserError: no tokenizer.json, or a file that is not valid.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file: a model needs its tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a valid tokenizer: {error}") from None
        settings = _read_optional(directory / "tokenizer_config.json")
        stops = _read_optional(directory / "generation_config.json").get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        if not all(isinstance(stop, int) for stop in stops):
            raise UserError(f"{directory / 'generation_config.json'}: eos_token_id: expected ids, found {stops!r:.60}")
        for key in SPECIAL_TOKENS:
            if not isinstance(_token_text(settings.get(key)), str | None):
                raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: expected a text: {settings[key]!r:.60}")
        try:
            return cls(tokenizer, settings, _find_template(directory, settings), stops)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{directory}: the chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Messages to the one string that the model sees.

        Raises:
            UserError: the template refuses these messages, or is broken.
        """
        cleaned = [{k: self._defuse(v) for k, v in message.items() if v is not None} for message in messages]
        try:
            return self._compiled.render(
                messages=cleaned,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """What the model is given when it is to answer `messages`."""
        return self.render(messages, add_generation_prompt=True)

    def render_samples(self, messages: Sequence[Message], record: int) -> list[Rendered]:
        """A conversation as one text with a span for each assistant turn; several texts if history is rewritten.

        Raises:
            UserError: the template cannot be used for training: an answered prompt does not start with the prompt.
        """
        whole = self.render(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        pieces = [self._span(messages, index) for index in turns]
        if all(whole.startswith(after) for after, _ in pieces):
            return [Rendered(whole, [span for _, span in pieces], record)]
        return [Rendered(after, [span], record) for after, span in pieces]

    def _span(self, messages: Sequence[Message], index: int) -> tuple[str, tuple[int, int]]:
        """The text up to and including turn `index`, and where in it that turn's targets lie."""
        before = self.render_prompt(messages[:index])
        after = self.render(messages[: index + 1])
        if not after.startswith(before):
            raise UserError(
                "the chat template cannot be trained with: rendering the answered prompt does not start with the prompt"
            )
        return after, (len(before), self._end_of_turn(after, len(before)))

    def _end_of_turn(self, text: str, start: int) -> int:
        """Where the turn's last control token ends; what a template puts behind it (a newline) is nobody's to say."""
        ends = [at + len(token) for token in self.control_texts if (at := text.rfind(token, start)) >= 0]
        last = max(ends, default=0)
        return last if last and not text[last:].strip() else len(text.rstrip())

    def text_sample(self, text: str, record: int) -> Rendered:
        """Plain text: everything is a target, and the end of the text is marked."""
        ended = self._defuse(text) + self.special.get("eos_token", "")
        return Rendered(ended, [(0, len(ended))], record)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model is given when it is to answer `messages`; a prefix of what it was trained on."""
        ids: list[int] = next(self.encode([Rendered(self.render_prompt(messages), [], 0)])).ids.tolist()
        return ids

    def encode(self, rendered: Iterable[Rendered]) -> Iterator[Sample]:
        """Texts to samples, with the tokenizer's own threads; exactly one BOS if the tokenizer wants one."""
        for batch in _batches(rendered, ENCODE_AT_ONCE):
            encodings = self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)
            for item, encoding in zip(batch, encodings, strict=True):
                yield self._sample(item, encoding)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def mark(self, sample: Sample, colour: bool) -> str:
        """A sample as the model sees it, its targets marked: green in a terminal, in brackets elsewhere."""
        opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
        changes = np.flatnonzero(np.diff(sample.is_target)) + 1
        pieces = []
        for start, end in itertools.pairwise([0, *changes.tolist(), len(sample.ids)]):
            text = self.decode(sample.ids[start:end].tolist(), keep_special=True)
            pieces.append(f"{opening}{text}{closing}" if sample.is_target[start] else text)
        return "".join(pieces)

    def _sample(self, item: Rendered, encoding: Encoding) -> Sample:
        ids = np.array(encoding.ids, dtype=np.int32)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        if BREAK in item.text:  # its own tokens have done their work
            kept = np.array([item.text[start:end] != BREAK for start, end in encoding.offsets], dtype=np.bool_)
            ids, starts = ids[kept], starts[kept]
        return self._with_bos(ids, _inside(starts, item.spans), item.record)

    def _with_bos(self, ids: Any, is_target: Any, record: int) -> Sample:
        if self.wants_bos and (not len(ids) or ids[0] != self.bos_id):
            ids, is_target = np.append(np.int32(self.bos_id or 0), ids), np.append(False, is_target)
        if len(is_target):
            is_target[0] = False  # nothing stands before the first token, so nothing predicts it
        return Sample(ids.astype(np.int32), is_target.astype(np.bool_), record)

    def _defuse(self, content: Any) -> Any:
        """Break up control tokens that stand in a message's own text."""
        if not isinstance(content, str):
            return content
        for token in self.control_texts:
            if token in content:
                content = content.replace(token, token[0] + BREAK + token[1:])
        return content

    def _id(self, key: str) -> int | None:
        text = self.special.get(key)
        return None if text is None else self.tokenizer.token_to_id(text)

    def _wants_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS first: its post-processor decides."""
        with_specials = self.tokenizer.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and with_specials[:1] == [self.bos_id]


def _inside(starts: Any, spans: list[tuple[int, int]]) -> Any:
    """Which tokens begin inside a span; a character made of several tokens gives all of them its own start."""
    is_target = np.zeros(len(starts), dtype=np.bool_)
    for first, last in spans:
        is_target |= (starts >= first) & (starts < last)
    return is_target


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


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja beats tokenizer_config.json, whose older form is a list of named templates."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
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


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks assistant text in some templates; rendered as if not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Any) -> ImmutableSandboxedEnvironment:
    """What templates are written for: a sandbox without write access, and the helpers that they call."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment
