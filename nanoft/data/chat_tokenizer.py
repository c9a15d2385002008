"""Turn chat messages into token ids, and mark which of them are targets.

A chat model never sees messages, but one text that a template renders from them. Training must render exactly as
inference does, and the loss must cover exactly what the model has to produce: each assistant turn and the token that
ends it. Both follow from rendering, never from searching the text for markers:

    before = render(messages[:i], add_generation_prompt=True)      the prompt
    after  = render(messages[:i + 1])                              the prompt, answered

`before` must be a prefix of `after`, and `after`, up to the end of the turn, a prefix of the whole conversation; the
target is what lies between. The marks of a template with {% generation %} are used, and verified in the same way. A
template that rewrites history (by dropping earlier reasoning) breaks the second condition; each assistant turn then
becomes a sample of its own, rendered as at inference.

Some templates break the first condition: they open a thought in the prompt that an answered turn does not show
(DeepSeek-R1), or put an empty thought before an answer that has none (Qwen3). Inference decides: the sample is
`before`, the answer as the model has to write it, and the token that ends the turn. Parts of a message that a template
omits are found by rendering a placeholder in their place, and reported.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from nanoft import UserError
from nanoft.batches import Array, Sample
from nanoft.config import Config
from nanoft.data import chat_template, tokenizer_files
from nanoft.data.chat_template import AS_USED, DEFAULT_TEMPLATE, OPEN_THOUGHT, USER, ChatTemplate, Marked, parts_of
from nanoft.data.chat_template import TemplateRefusal as TemplateRefusal
from nanoft.data.control_tokens import ControlTokens
from nanoft.data.formats import CONTROL, RESERVED, TRAINING_FIELDS, is_trained
from nanoft.data.formats import Message as Message
from nanoft.data.template_sandbox import COMPILE_ERRORS, BoundedEnvironment
from nanoft.data.tokenizer_files import BREAK, PLACEHOLDER, as_user_error

BATCH = 128  # texts handed to the tokenizer's threads together


@dataclass(frozen=True)
class Rendered:
    """A text, and the character spans in it that are targets."""

    text: str
    spans: list[tuple[int, int]]
    record: int
    turns: list[int] = field(default_factory=list)  # the message of each span
    notes: tuple[str, ...] = ()  # warnings about this conversation


@dataclass(frozen=True)
class _Conversation:
    """Cleaned messages, with the template and the variables to render them."""

    template: ChatTemplate
    messages: list[Message]
    variables: dict[str, Any]  # other variables of the template: tools, ...

    @functools.cached_property
    def rendered(self) -> Marked:
        return self.template.render(self.messages, False, self.variables)

    def prompt(self, index: int) -> str:
        """The prompt to which message `index` is the answer."""
        return self.template.render(self.messages[:index], True, self.variables)[0]


class _Turn(NamedTuple):
    text: str  # begins with everything up to the turn
    span: tuple[int, int]  # of the targets in it
    note: str = ""

    def targets(self) -> str:
        return self.text[slice(*self.span)]


class ChatTokenizer:
    """A model's tokenizer and chat template, read from its directory without transformers."""

    def __init__(
        self,
        directory: Path,  # with tokenizer.json, tokenizer_config.json, the chat templates and generation_config.json
        template_args: Mapping[str, Any] | None = None,  # more variables of the template: enable_thinking
        template: str | None = None,  # a file, `chatml`, or a name in the model's own list; None: the model's own
        may_omit: bool = False,  # train without what the template omits instead of refusing it
        add_tokens: Sequence[str] = (),  # model.add_tokens
        parses_control: bool = False,  # data.control_tokens=parse
    ):
        self.directory, self.template_args, self.may_omit = directory, dict(template_args or {}), may_omit
        if taken := sorted(RESERVED & self.template_args.keys()):
            raise UserError(f"data.template_args: {taken[0]}: is set by nanoft: remove it")
        self.tokenizer = tokenizer = tokenizer_files.read_tokenizer(directory)
        self.added_ids = tokenizer_files.add_tokens(tokenizer, add_tokens)
        self.special, templates, stop_ids = tokenizer_files.read_settings(directory)
        default, with_tools = templates.get("default"), templates.get("tool_use")  # the latter if it differs
        if template is not None:
            default, with_tools = chat_template.choose_template(template, templates, tokenizer), None
        self.template, self.has_own_template = default or DEFAULT_TEMPLATE, default is not None
        ids = {key: tokenizer.token_to_id(text) for key, text in self.special.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = 0  # padding is masked, so any row of the embedding will do; not every pad token has one
        first = tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.wants_bos = self.bos_id is not None and first == [self.bos_id]  # its post-processor adds it
        self.control = ControlTokens(tokenizer, parses_control)
        self._widths = tokenizer_files.byte_widths(tokenizer)
        self.date = datetime.datetime.now()  # what strftime_now returns
        self._environment = BoundedEnvironment(lambda: self.date)
        ends = {text for i in (*stop_ids, self.eos_id) if i is not None and (text := tokenizer.id_to_token(i))}
        made = self._environment, self.special, self.control.pattern, ends
        try:
            self._plain = ChatTemplate(self.template, *made)
            self._with_tools = ChatTemplate(with_tools, *made) if with_tools else self._plain
        except COMPILE_ERRORS as error:
            place = directory if template is None else f"model.chat_template: {template}"
            raise UserError(f"{place}: the chat template is not valid: {error}") from None
        self.turn_end = self._plain.turn_end
        self.variables = self._plain.variables | self._with_tools.variables
        end_id = tokenizer.token_to_id(self.turn_end[0]) if self.turn_end else None
        self.stop_ids = sorted({*stop_ids, *(i for i in (end_id, self.eos_id) if i is not None)})
        stops, prompt = [text for i in self.stop_ids if (text := tokenizer.id_to_token(i))], ""
        with contextlib.suppress(TemplateRefusal):
            prompt = self.render_prompt([{"role": "user", "content": "a"}]) if parses_control else ""
        self.control.learn(stops, prompt)

    @classmethod
    def from_config(cls, directory: Path, config: Config) -> ChatTokenizer:
        """The tokenizer with the template and the variables that a run's settings choose."""
        data, model = config.data, config.model
        choices = data.unrendered == "warn", model.add_tokens, data.control_tokens == "parse"
        return cls(directory, data.template_args, model.chat_template, *choices)

    def fingerprint(self) -> str:
        """All that ids and targets depend on: tokenizer, template, its variables, stop tokens, the date if printed."""
        sources = [self.template, self._with_tools.source]
        date = self.date.date().isoformat() if "strftime_now" in "".join(sources) else ""
        chosen = [self.template_args, self.special, date, self.control.parsed, self.stop_ids]
        variables = json.dumps([sources, *chosen], sort_keys=True, default=str)
        return variables + hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None,
        template_args: Mapping[str, Any] | None = None,  # of this conversation; they override those of the settings
    ) -> str:  # fmt: skip
        """The text that the model sees; raises TemplateRefusal."""
        conversation = self._conversation(messages, tools, template_args)
        return conversation.prompt(len(messages)) if add_generation_prompt else conversation.rendered[0]

    def render_prompt(self, messages: Sequence[Message], tools: Any = None, template_args: Any = None) -> str:
        return self.render(messages, True, tools, template_args)

    def render_samples(
        self, messages: Sequence[Message], record: int, tools: Any = None, train_on: str = "assistant",
        template_args: Mapping[str, Any] | None = None,
    ) -> list[Rendered]:  # fmt: skip
        """A conversation as one text with a span for each assistant turn; several texts if history is rewritten.

        Args:
            train_on: `assistant`: every assistant turn; `last_assistant`: the last one; `all`: everything. An assistant
                message with `weight: 0` or `train: false` is never a target. If the last answer is empty, the token
                that ends it is the only target of the conversation.
        Raises:
            TemplateRefusal: the template cannot be used for training on this conversation.
        """
        whole, last = self._conversation(messages, tools, template_args), messages[-1]
        says = last.get("tool_calls") or (last.get("content") or "").strip()
        if last["role"] == "assistant" and is_trained(last) and not says:  # some templates refuse an empty answer
            return [self._empty_answer(whole, record)]
        rendered = whole.rendered[0]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            notes = self._notes(whole, {}, [i for i in answers if is_trained(messages[i])], template_args)
            excluded = [self._turn(whole, index) for index in answers if not is_trained(messages[index])]
            if not all(rendered.startswith(turn.text[: turn.span[1]]) for turn in excluded):
                raise TemplateRefusal("the chat template rewrites earlier turns: use data.train_on=assistant")
            edges = [0, *itertools.chain.from_iterable(turn.span for turn in excluded), len(rendered)]
            between = zip(edges[::2], edges[1::2], strict=True)
            return [Rendered(rendered, [(start, end) for start, end in between if start < end], record, [], notes)]
        trained = [i for i in (answers[-1:] if train_on == "last_assistant" else answers) if is_trained(messages[i])]
        turns = {index: self._turn(whole, index) for index in trained}
        notes = self._notes(whole, turns, trained, template_args)
        for text in (rendered, *(turn.text for turn in [*turns.values()][-1:])):
            if all(text.startswith(turn.text[: turn.span[1]]) for turn in turns.values()):
                return [Rendered(text, [turn.span for turn in turns.values()], record, trained, notes)]
        return [Rendered(turn.text, [turn.span], record, [index], notes) for index, turn in turns.items()]

    def text_sample(self, text: str, record: int, prompt_characters: int = 0) -> Rendered:
        """Plain text, ended by the end-of-sequence token: everything after the prompt is a target."""
        prompt, said = map(self.control.escape, (text[:prompt_characters], text[prompt_characters:]))
        ended = prompt + (said.rstrip() if self.control.is_ended(said) else said + self.special.get("eos_token", ""))
        return Rendered(ended, [(len(prompt), len(ended))], record, [0] if prompt else [])

    def _empty_answer(self, whole: _Conversation, record: int) -> Rendered:
        """A prompt, and the token that ends a turn."""
        template, at = whole.template, len(whole.messages) - 1
        other = template.next_role.get("user", self.special.get("eos_token", ""))
        text = (prompt := whole.prompt(at)) + (template.tail if template.turn_end else other)
        return Rendered(text, [(len(prompt), template.end_of_answer(text, len(prompt)))], record, [at])

    def _conversation(
        self, messages: Sequence[Message], tools: Any, template_args: Mapping[str, Any] | None
    ) -> _Conversation:
        """The template's input: control tokens escaped, without null values and training fields."""
        kept = ({k: v for k, v in m.items() if v is not None and k not in TRAINING_FIELDS} for m in messages)
        cleaned = [self.control.clean(message) for message in kept]
        variables = {"tools": self.control.escape(tools) or None, **self.template_args, **(template_args or {})}
        return _Conversation(self._with_tools if variables["tools"] else self._plain, cleaned, variables)

    def _turn(self, whole: _Conversation, index: int) -> _Turn:
        """A text that begins with everything up to turn `index`, and where the turn's targets are in it."""
        template, message, before = whole.template, whole.messages[index], whole.prompt(index)
        start, note, (after, marks) = len(before), "", whole.rendered
        if not marks and after.startswith(before) and (end := template.verbatim(message, after, start)):
            return _Turn(after, (start, end))
        if index < len(whole.messages) - 1:
            after, marks = template.render(whole.messages[: index + 1], False, whole.variables)
        if not after.startswith(before):
            after, marks, note = self._as_used(whole, index, before, after), [], AS_USED
        said = message.get("content", "").lstrip().startswith(template.lead.strip())
        if template.has_empty_thought and not said and after.startswith(template.lead, start):
            extra = len(template.lead)
            after, note = before + after[start + extra :], AS_USED
            marks = [(first - extra, last - extra) for first, last in marks]
        marked = [mark for mark in marks if mark[1] > start]
        first, last = (marked[0][0], marked[-1][1]) if marked else (start, 0)
        end = template.end_of_mark(after, last) if marked else template.end_of_answer(after, start)
        if any(value in after[start:first] for _, value, _ in parts_of(message)):
            start = first  # otherwise the template's own words precede the mark; the model has to write them
        if not after[start:end].strip():
            raise TemplateRefusal("the chat template omits the answer: there are no target tokens")
        if role := template.next_role.get("tool" if "tool_calls" in message else "user"):
            after, end = after[:end] + role, end + len(role)
        return _Turn(after, (start, end), note)

    def _as_used(self, whole: _Conversation, index: int, before: str, after: str) -> str:
        """The prompt and what the model has to write, for a template whose answered prompt (`after`) differs."""
        template, message, opened = whole.template, whole.messages[index], OPEN_THOUGHT.search(before)
        base, answer = before[: opened.start()] if opened else before, None
        at = len(base.rstrip())
        if after.startswith(base[:at]) and (opened or after[at:][:1].isspace()):
            answer = after[at:].lstrip()
        else:  # the text before the last turn is rendered differently once the turn is answered
            header = base.removeprefix(template.render(whole.messages[:index], False, whole.variables)[0])
            if header != base and self.control.pattern.search(header) and header in after:
                answer = after.rpartition(header)[2].lstrip()
        if answer is not None:
            return before + chat_template.continue_thought(opened, message, answer, template.variables)
        for words in template.verbatim_answers(message):
            if after.endswith(template.lead + words + template.tail):
                return before + template.lead + words + template.tail
        raise TemplateRefusal("the chat template renders a conversation that does not start with its prompt")

    def _notes(
        self, whole: _Conversation, turns: dict[int, _Turn], learned: Sequence[int], template_args: Any
    ) -> tuple[str, ...]:
        """Warnings about a conversation; raises TemplateRefusal if it must not be trained on."""
        omitted = list(dict.fromkeys(self._omitted(whole, turns, learned)))
        if omitted and (not self.may_omit or USER in omitted):
            fix = "" if USER in omitted else ", or set data.unrendered=warn to train without it"
            what = USER if USER in omitted else omitted[0]
            raise TemplateRefusal(f"the chat template omits {what}: choose another with model.chat_template{fix}")
        unread = [name for name in template_args or () if name not in whole.template.variables]
        notes = [f"the chat template omits {what}" for what in omitted]
        notes += [f"chat_template_kwargs: the chat template does not read {name}" for name in unread]
        return tuple(dict.fromkeys([*notes, *(turn.note for turn in turns.values() if turn.note)]))

    def _omitted(self, whole: _Conversation, turns: dict[int, _Turn], learned: Sequence[int]) -> Iterator[str]:
        """The parts of a conversation that are missing from its renderings, or from the targets if it is an answer."""
        text = whole.rendered[0]
        if whole.variables["tools"]:
            with contextlib.suppress(TemplateRefusal):  # the template requires tools
                if whole.template.render(whole.messages, False, {**whole.variables, "tools": None})[0] == text:
                    yield "tools"
        texts = [text, *(turn.text for turn in turns.values())]
        for index, message in enumerate(whole.messages):
            shown = [turns[index].targets()] if index in turns else texts
            said = message.get("content", "").strip()
            if message.keys() <= chat_template.PLAIN and any(said in text for text in shown):
                continue  # the usual case, which needs no placeholders
            parts = parts_of(message) if message["role"] != "assistant" or index in learned else []
            for what, value, replaced in parts:
                elsewhere = sum(other.count(value) for _, other, also in parts if also is not replaced)
                is_shown = any(text.count(value) > elsewhere for text in shown)
                if not is_shown and not self._shows(whole, turns, index, replaced):
                    yield what

    def _shows(self, whole: _Conversation, turns: dict[int, _Turn], index: int, replaced: Message) -> bool:
        """Whether a message's placeholder is rendered: text that a template trims or escapes is not omitted."""
        before, after = whole.messages[:index], whole.messages[index + 1 :]
        with contextlib.suppress(TemplateRefusal):
            if index in turns:
                return PLACEHOLDER in self._turn(replace(whole, messages=[*before, replaced]), index).targets()
            other = replace(whole, messages=[*before, replaced, *after])
            return any(PLACEHOLDER in text for text in (other.rendered[0], *map(other.prompt, turns)))
        return True

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None, template_args: Any = None) -> list[int]:
        """The ids of a prompt; a prefix of those that the model was trained on."""
        ids = self._ids(self.render_prompt(messages, tools, template_args))
        return [self.bos_id or 0, *ids] if self.wants_bos and ids[:1] != [self.bos_id] else ids

    def encode(self, rendered: Iterable[Rendered]) -> Iterator[Sample]:
        """Encode texts; the tokenizer's threads encode one batch while the next ones are being rendered."""
        with ThreadPoolExecutor(2) as pool:  # one may wait for the GIL while the other keeps the cores busy
            under_way: deque[tuple[list[Rendered], Any]] = deque()
            items = iter(rendered)
            while (batch := list(itertools.islice(items, BATCH))) or under_way:
                if batch:
                    under_way.append((batch, pool.submit(self._encodings, [item.text for item in batch])))
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
            text = self.control.shown(sample.ids[start:end].tolist(), self.decode)
            text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)  # keep them from the terminal
            plain, colored = ("⟦{}⟧", "\033[32m{}\033[0m") if sample.is_target[start] else ("{}", "\033[2m{}\033[0m")
            pieces.append((colored if color else plain).format(text))
        return "".join(pieces)

    def encode_now(self, rendered: list[Rendered]) -> list[Sample]:
        """Encode a few texts at once."""
        return list(self._samples(rendered, self._encodings([item.text for item in rendered])))

    def _encodings(self, texts: list[str], with_offsets: bool = False) -> list[Encoding]:
        is_fast = self._widths is not None and not with_offsets  # offsets follow from the widths of the tokens
        encode = self.tokenizer.encode_batch_fast if is_fast else self.tokenizer.encode_batch
        with as_user_error("tokenizer.json: this tokenizer cannot encode the text"):
            return encode(texts, add_special_tokens=False)

    def _samples(self, batch: list[Rendered], encodings: list[Encoding]) -> Iterator[Sample]:
        for item, encoded in zip(batch, encodings, strict=True):
            ids = np.array(encoded.ids, dtype=np.int32)
            starts, ends, edges = self._places(item, encoded, ids)
            at = ends.searchsorted(edges, side="right")  # the first token that ends after each edge
            is_inside = starts[at] < edges  # that token begins before the edge
            if item.turns and is_inside[::2].any():
                yield from map(self._sample_of_turn, itertools.repeat(item), item.spans, item.turns)
                continue
            is_target = np.zeros(len(ids), dtype=np.bool_)
            for first, last in zip(at[::2], (at + is_inside)[1::2], strict=True):
                is_target[first:last] = True
            if BREAK in item.text:  # its tokens are dropped
                places = zip(starts[:-1].tolist(), ends.tolist(), strict=True)
                kept = np.array([item.text[start:end] != BREAK for start, end in places], dtype=np.bool_)
                ids, is_target = ids[kept], is_target[kept]
            yield self._with_bos(ids, is_target, item.record, item.turns[0] if len(item.turns) == 1 else None)

    def _places(self, item: Rendered, encoded: Encoding, ids: Array) -> tuple[Array, Array, Array]:
        """The start of each token (and the end of the text), the end of each, and the edges of the spans.

        Returns:
            (n + 1,), (n,), (2 spans,): all in bytes if the byte widths of the tokens are known, else in characters.
        """
        text, edges = item.text, np.array(item.spans, np.int64).reshape(-1)
        if self._widths is not None and BREAK not in text:
            starts = np.zeros(len(ids) + 1, np.int64)
            self._widths[ids.astype(np.int64)].cumsum(out=starts[1:])
            if starts[-1] == (len(text) if text.isascii() else len(text.encode())):  # else characters are dropped
                edges = edges if text.isascii() else np.array([len(text[:edge].encode()) for edge in edges])
                return starts, starts[1:], edges
        if self._widths is not None:
            (encoded,) = self._encodings([text], with_offsets=True)
        starts, ends = np.array(encoded.offsets, np.int64).reshape(-1, 2).T
        return np.append(starts, len(text)), np.maximum.accumulate(ends), edges

    def _sample_of_turn(self, item: Rendered, span: tuple[int, int], turn: int) -> Sample:
        """A turn whose first token would merge with the prompt: both are encoded separately, as at inference."""
        start, end = span
        prompt = self._ids(item.text[:start])
        broken = item.text[:start] + BREAK + item.text[start:end]
        ids = np.array(prompt + self._ids(broken, after=start), dtype=np.int32)
        return self._with_bos(ids, np.arange(len(ids)) >= len(prompt), item.record, turn)

    def _ids(self, text: str, after: int = -1) -> list[int]:
        """The ids of a text, without those of BREAK; only of tokens that begin after character `after`."""
        (encoded,) = self._encodings([text], with_offsets=True)
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return [token for token, (start, end) in pairs if start > after and text[start:end] != BREAK]

    def _with_bos(self, ids: Any, is_target: Any, record: int, turn: int | None) -> Sample:
        if self.wants_bos and (not len(ids) or ids[0] != self.bos_id):
            ids, is_target = np.append(np.int32(self.bos_id or 0), ids), np.append(False, is_target)
        if len(is_target):
            is_target[0] = False  # nothing predicts the first token
        return Sample(ids, is_target, record, turn)
