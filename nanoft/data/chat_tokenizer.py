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

Some templates break the first: they open a thought in the prompt that an answered turn does not show (DeepSeek-R1), or
put an empty thought before an answer that has none (Qwen3). Use is what counts: the sample is `before`, the answer as
the model has to write it, and the token that ends the turn. Whatever a template leaves out of a message is found by
rendering it with a placeholder, and named.
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
from nanoft.config import Config
from nanoft.data import tokenizer_files
from nanoft.data.chat_template import AS_USED, CHATML, DEFAULT_TEMPLATE, RESERVED, USER, ChatTemplate, parts_of
from nanoft.data.chat_template import TemplateRefusal as TemplateRefusal
from nanoft.data.control_tokens import ControlTokens
from nanoft.data.formats import CONTROL, TRAINING_FIELDS, is_trained
from nanoft.data.formats import Message as Message
from nanoft.data.template_sandbox import COMPILE_ERRORS, BoundedEnvironment, find_marks
from nanoft.data.tokenizer_files import BREAK, PLACEHOLDER, SPECIAL_TOKENS, as_user_error, token_text

# A thought that a prompt opens at its end, and perhaps closes at once: <think>, Cohere's token, Gemma 4's channel.
OPEN_THOUGHT = re.compile(
    r"\s*(?:<(?P<tag>\w+)>|<\|START_THINKING\|>|<\|channel>thought)(?P<space>\s*)"
    r"(?P<closed>(?:</(?P=tag)>|<\|END_THINKING\|>|<channel\|>)\s*)?$"
)
CANNOT_ENCODE = "tokenizer.json: this tokenizer cannot encode the text"
BATCH = 128  # texts handed to the tokenizer's threads together


@dataclass(frozen=True)
class Rendered:
    """A text, and the character spans in it that are targets."""

    text: str
    spans: list[tuple[int, int]]
    record: int
    turns: list[int] = field(default_factory=list)  # the message of each span
    notes: tuple[str, ...] = ()  # what the user should know of this conversation


class _FullRendering(NamedTuple):
    messages: list[Message]  # cleaned
    given: dict[str, Any]  # the template's other variables: tools, ...
    text: str
    marks: list[tuple[int, int]]


class _Turn(NamedTuple):
    text: str  # begins with everything up to the turn
    start: int  # of the targets in it
    end: int
    note: str = ""

    @property
    def shown(self) -> str:
        return self.text[self.start : self.end]


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
        tool_template: str | None = None,  # for conversations with tools, if it is another
        may_omit: bool = False,  # train without what the template does not show, rather than refuse it
        parses_control: bool = False,  # data.control_tokens=parse
    ):
        self.tokenizer, self.template_args = tokenizer, dict(template_args or {})
        self.template, self.may_omit = template or DEFAULT_TEMPLATE, may_omit
        self.has_own_template = template is not None
        tokens = {key: token_text(settings.get(key)) for key in SPECIAL_TOKENS}
        self.special = {key: text for key, text in tokens.items() if text is not None}
        ids = {key: tokenizer.token_to_id(text) for key, text in self.special.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = 0  # nothing sees padding, so any row of the embedding will do; not every pad token has one
        first = tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.wants_bos = self.bos_id is not None and first == [self.bos_id]  # its post-processor adds it
        self.control = ControlTokens(tokenizer, parses_control)
        self._widths = tokenizer_files.byte_widths(tokenizer)
        self.date = datetime.datetime.now()  # what strftime_now returns
        self._environment = BoundedEnvironment(lambda: self.date)
        ends = {text for i in (*stop_ids, self.eos_id) if i is not None and (text := tokenizer.id_to_token(i))}
        made = self._environment, self.special, self.control.pattern, ends
        self._plain = self._with_tools = ChatTemplate(self.template, *made)
        if tool_template:
            self._with_tools = ChatTemplate(tool_template, *made)
        self.turn_end = self._plain.turn_end
        self.variables = self._plain.variables | self._with_tools.variables
        end_id = tokenizer.token_to_id(self.turn_end[0]) if self.turn_end else None
        self.stop_ids = sorted({*stop_ids, *(i for i in (end_id, self.eos_id) if i is not None)})
        stops, prompt = [text for i in self.stop_ids if (text := tokenizer.id_to_token(i))], ""
        with contextlib.suppress(TemplateRefusal):
            prompt = self.render_prompt([{"role": "user", "content": "a"}]) if parses_control else ""
        self.control.learn(stops, prompt)

    @classmethod
    def from_directory(
        cls, directory: Path, template_args: Mapping[str, Any] | None = None, template: str | None = None,
        may_omit: bool = False, add_tokens: Sequence[str] = (), parses_control: bool = False,
    ) -> ChatTokenizer:  # fmt: skip
        """Read tokenizer.json, tokenizer_config.json, the chat templates and generation_config.json.

        template: a file, `chatml`, or a name in the model's own list; None: the model's own.
        """
        if taken := sorted(set(template_args or ()) & {*RESERVED, *SPECIAL_TOKENS}):
            raise UserError(f"data.template_args: {taken[0]}: is set by nanoft: remove it")
        tokenizer = tokenizer_files.read_tokenizer(directory)
        added_ids = tokenizer_files.add_tokens(tokenizer, add_tokens)
        settings, templates, stop_ids = tokenizer_files.read_settings(directory)
        default, with_tools = templates.get("default"), templates.get("tool_use")
        if template is not None:
            has_chatml = tokenizer.token_to_id("<|im_end|>") is not None
            known = {"chatml": CHATML if has_chatml else DEFAULT_TEMPLATE, **templates}
            default, with_tools = tokenizer_files.choose_template(template, known), None
        try:
            chat = cls(tokenizer, settings, default, stop_ids, template_args, with_tools, may_omit, parses_control)
        except COMPILE_ERRORS as error:
            place = directory if template is None else f"model.chat_template: {template}"
            raise UserError(f"{place}: the chat template is not valid: {error}") from None
        chat.directory, chat.added_ids = directory, added_ids
        return chat

    @classmethod
    def from_config(cls, directory: Path, config: Config) -> ChatTokenizer:
        """With the template and the variables that the settings of a run ask for."""
        data, model = config.data, config.model
        choices = data.unrendered == "warn", model.add_tokens, data.control_tokens == "parse"
        return cls.from_directory(directory, data.template_args, model.chat_template, *choices)

    def fingerprint(self) -> str:
        """Everything that ids depend on: the tokenizer, the template, its variables, and its date if it prints one."""
        sources = [self.template, self._with_tools.source]
        date = self.date.date().isoformat() if "strftime_now" in "".join(sources) else ""
        chosen = [self.template_args, self.special, date, self.control.parsed]
        variables = json.dumps([sources, *chosen], sort_keys=True, default=str)
        return variables + hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None,
        template_args: Mapping[str, Any] | None = None,  # of this conversation, before those of the settings
    ) -> str:  # fmt: skip
        """The string that the model sees; raises TemplateRefusal."""
        return self._render(self._clean(messages), add_generation_prompt, self._given(tools, template_args))[0]

    def render_prompt(self, messages: Sequence[Message], tools: Any = None, template_args: Any = None) -> str:
        return self.render(messages, True, tools, template_args)

    def render_samples(
        self, messages: Sequence[Message], record: int, tools: Any = None, train_on: str = "assistant",
        template_args: Mapping[str, Any] | None = None,
    ) -> list[Rendered]:  # fmt: skip
        """A conversation as one text with a span for each assistant turn; several texts if history is rewritten.

        Args:
            train_on: `assistant`: every assistant turn; `last_assistant`: the last one; `all`: everything. An assistant
                message with `weight: 0` or `train: false` is never a target.
        Raises:
            TemplateRefusal: the template cannot be used for training on this conversation.
        """
        whole = self._whole(self._clean(messages), self._given(tools, template_args))
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            notes = self._notes(whole, {}, [i for i in answers if is_trained(messages[i])], template_args)
            excluded = [self._turn(whole, index) for index in answers if not is_trained(messages[index])]
            if not all(whole.text.startswith(turn.text[: turn.end]) for turn in excluded):
                raise TemplateRefusal("the chat template rewrites earlier turns: use data.train_on=assistant")
            edges = [0, *itertools.chain.from_iterable(turn[1:3] for turn in excluded), len(whole.text)]
            between = zip(edges[::2], edges[1::2], strict=True)
            return [Rendered(whole.text, [(start, end) for start, end in between if start < end], record, [], notes)]
        trained = [i for i in (answers[-1:] if train_on == "last_assistant" else answers) if is_trained(messages[i])]
        turns = {index: self._turn(whole, index) for index in trained}
        notes = self._notes(whole, turns, trained, template_args)
        for text in (whole.text, *(turn.text for turn in [*turns.values()][-1:])):
            if all(turn.text is text or text.startswith(turn.text[: turn.end]) for turn in turns.values()):
                return [Rendered(text, [turn[1:3] for turn in turns.values()], record, trained, notes)]
        return [Rendered(turn.text, [turn[1:3]], record, [index], notes) for index, turn in turns.items()]

    def text_sample(self, text: str, record: int, prompt_characters: int = 0) -> Rendered:
        """Plain text, ended by the end-of-sequence token: everything after the prompt is a target."""
        prompt, said = map(self.control.escape, (text[:prompt_characters], text[prompt_characters:]))
        ended = prompt + (said.rstrip() if self.control.is_ended(said) else said + self.special.get("eos_token", ""))
        return Rendered(ended, [(len(prompt), len(ended))], record, [0] if prompt else [])

    def _clean(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that the template gets: control tokens escaped, without null values and training fields."""
        kept = ({k: v for k, v in m.items() if v is not None and k not in TRAINING_FIELDS} for m in messages)
        return [self.control.clean(message) for message in kept]

    def _given(self, tools: Any, template_args: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"tools": self.control.escape(tools) or None, **self.template_args, **(template_args or {})}

    def _template(self, given: Mapping[str, Any]) -> ChatTemplate:
        return self._with_tools if given["tools"] else self._plain

    def _render(
        self, cleaned: list[Message], add_generation_prompt: bool, given: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:  # the text, and the spans of {% generation %} in it
        return find_marks(self._template(given).render(cleaned, add_generation_prompt, given))

    def _whole(self, cleaned: list[Message], given: dict[str, Any]) -> _FullRendering:
        return _FullRendering(cleaned, given, *self._render(cleaned, False, given))

    def _turn(self, whole: _FullRendering, index: int) -> _Turn:
        """A text that begins with everything up to turn `index`, and where the turn's targets are in it."""
        template, message = self._template(whole.given), whole.messages[index]
        before = self._render(whole.messages[:index], True, whole.given)[0]
        if not whole.marks and (span := self._verbatim(whole, index, before)):
            return _Turn(whole.text, *span)
        after, marks = whole.text, whole.marks
        if index < len(whole.messages) - 1:
            after, marks = self._render(whole.messages[: index + 1], False, whole.given)
        start, note = len(before), ""
        if not after.startswith(before):
            after, marks, note = self._as_used(whole, index, before, after), [], AS_USED
        said = message.get("content", "").lstrip().startswith(template.lead.strip())
        if template.has_empty_thought and not said and after.startswith(template.lead, start):
            extra = len(template.lead)
            after, note = before + after[start + extra :], AS_USED
            marks = [(first - extra, last - extra) for first, last in marks]
        marked = [mark for mark in marks if mark[1] > start]
        if marked:  # the marked span, extended to the token that ends the turn
            first, end = max(marked[0][0], start), marked[-1][1]
            if any(value in after[start:first] for _, value, _ in parts_of(message)):
                start = first  # else the template's own words are not in the prompt: the model has to write them
            inside = len(after[:end].rstrip())
            if any(after.endswith(control, start, inside) for control in self.control.texts):
                end = inside
            elif following := template.end_of_turn(after[end:], at_once=True):
                end += following.end()
        else:
            end = self._end_of_turn(template, after, start)
        if not after[start:end].strip():
            raise TemplateRefusal("the chat template omits the answer: there are no target tokens")
        if role := template.next_role.get("tool" if "tool_calls" in message else "user"):
            after, end = after[:end] + role, end + len(role)
        return _Turn(after, start, end, note)

    def _verbatim(self, whole: _FullRendering, index: int, before: str) -> tuple[int, int] | None:
        """The turn's targets, if just the answer and its end follow the prompt: saves a rendering."""
        template, message = self._template(whole.given), whole.messages[index]
        content, lead = message.get("content", ""), "" if template.has_empty_thought else template.lead
        ending = template.tail[: template.turn_end.end()] if template.turn_end else ""
        trimmed = template.has_empty_thought and content[:1].isspace()  # behind the thought that is taken out
        plain = content and not trimmed and message.keys() <= {"role", "content"}
        if ending and plain and whole.text.startswith(before):
            for answer in (content, content.strip()):
                if answer and whole.text.startswith(lead + answer + ending, len(before)):
                    return len(before), len(before) + len(lead) + len(answer) + len(ending)
        return None

    def _as_used(self, whole: _FullRendering, index: int, before: str, after: str) -> str:
        """The prompt and what the model has to write, where `after` shows the answered prompt in another way."""
        message, template, opened = whole.messages[index], self._template(whole.given), OPEN_THOUGHT.search(before)
        base, at = before[: opened.start()] if opened else before, -1
        if after.startswith(base.rstrip()) and (opened or after[len(base.rstrip()) :][:1].isspace()):
            at = len(base.rstrip())
        else:  # what stands before the last turn is rendered otherwise, once it is answered
            header = base.removeprefix(self._render(whole.messages[:index], False, whole.given)[0])
            if header != base and self.control.pattern.search(header) and header in after:
                at = after.rindex(header) + len(header)
        if at >= 0:
            answer = after[at:].lstrip()
            return before + (self._in_thought(template, message, answer, opened) if opened else answer)
        content = message.get("content", "")
        for words in (content, content.strip()):  # a plain answer
            answer = template.lead + words + template.tail
            if words and message.keys() <= {"role", "content"} and after.endswith(answer):
                return before + answer
        raise TemplateRefusal("the chat template renders an answered prompt that does not start with the prompt")

    def _in_thought(self, template: ChatTemplate, message: Message, answer: str, opened: re.Match[str]) -> str:
        """An answer behind a prompt that ends in <tag>: the rest of the thought, </tag> and the answer.

        Without a thought, the model closes it at once; behind an empty one, <tag></tag>, a thought is refused.
        """
        tag, space, content = opened["tag"], opened["space"], message.get("content", "")
        opening, closing, gap = f"<{tag}>", f"</{tag}>", "\n"
        if not tag:
            opening, closing, gap = opened[0].strip(), "<|END_THINKING|>" if "START" in opened[0] else "<channel|>", ""
        thought, (said, closes, rest) = message.get("reasoning_content", ""), content.rpartition(closing)
        if opened["closed"]:
            if (thought + said).strip():
                names = " or ".join(sorted(name for name in template.variables if "think" in name)) or "a variable"
                fix = f"set {names} to match the answers, in data.template_args or each record's chat_template_kwargs"
                raise TemplateRefusal(f"the chat template closes the thought in the prompt, the answer has one: {fix}")
            return answer
        if answer.startswith(opening):  # the template shows it, but not as the prompt begins it
            return answer.removeprefix(opening).removeprefix(space)
        if answer.startswith(closing):  # it shows that there is none
            return answer
        if closes:
            written = content[: len(content) - len(rest.lstrip())]
            return written.lstrip().removeprefix(opening).removeprefix(space) + answer
        return thought.strip("\n") + gap + closing + 2 * gap + answer

    def _end_of_turn(self, template: ChatTemplate, text: str, start: int) -> int:
        """After the token that ends the turn; what a template adds to it (a newline) is not a target."""
        if template.tail and text.endswith(template.tail):
            first = template.turn_end.end() if template.turn_end else len(template.tail.rstrip())
            return len(text) - len(template.tail) + first
        found = list(self.control.pattern.finditer(text, start))
        ends = [match.end() for match in found]
        if stops := [match.end() for match in found if match[0] in template.stops]:
            return stops[-1]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text.rstrip())

    def _notes(
        self, whole: _FullRendering, turns: dict[int, _Turn], learned: Sequence[int], template_args: Any
    ) -> tuple[str, ...]:
        """What the user should know of a conversation; a TemplateRefusal if it must not be trained on."""
        omitted = list(dict.fromkeys(self._omitted(whole, turns, learned)))
        if omitted and (not self.may_omit or USER in omitted):
            fix = "" if USER in omitted else ", or set data.unrendered=warn to train without it"
            what = USER if USER in omitted else omitted[0]
            raise TemplateRefusal(f"the chat template omits {what}: choose another with model.chat_template{fix}")
        unread = [name for name in template_args or () if name not in self._template(whole.given).variables]
        notes = [f"the chat template omits {what}" for what in omitted]
        notes += [f"chat_template_kwargs: the chat template does not read {name}" for name in unread]
        return tuple(dict.fromkeys([*notes, *(turn.note for turn in turns.values() if turn.note)]))

    def _omitted(self, whole: _FullRendering, turns: dict[int, _Turn], learned: Sequence[int]) -> Iterator[str]:
        """The parts of a conversation that are nowhere in its renderings; of an answer, not among its targets."""
        template, without_tools = self._template(whole.given), None
        if whole.given["tools"]:
            with contextlib.suppress(TemplateRefusal):  # it needs them
                without_tools = template.render(whole.messages, False, {**whole.given, "tools": None})
            if without_tools is not None and find_marks(without_tools)[0] == whole.text:
                yield "tools"
        texts = [whole.text, *(turn.text for turn in turns.values())]
        for index, message in enumerate(whole.messages):
            parts = parts_of(message) if message["role"] != "assistant" or index in learned else []
            for what, value, replaced in parts:
                if index in turns:
                    elsewhere = sum(other.count(value) for _, other, also in parts if also is not replaced)
                    is_shown = turns[index].shown.count(value) > elsewhere
                else:
                    is_shown = any(value in text for text in texts)
                if not is_shown and not self._shows(whole, turns, index, replaced):
                    yield what

    def _shows(self, whole: _FullRendering, turns: dict[int, _Turn], index: int, replaced: Message) -> bool:
        """Whether a message's placeholder is rendered: what a template changes (trims, escapes) is not omitted."""
        messages, given = [*whole.messages[:index], replaced, *whole.messages[index + 1 :]], whole.given
        with contextlib.suppress(TemplateRefusal):
            if index in turns:
                return PLACEHOLDER in self._turn(self._whole(messages[: index + 1], given), index).shown
            texts = [self._render(messages, False, given)[0]]
            texts += [self._render(messages[:turn], True, given)[0] for turn in turns]
            return any(PLACEHOLDER in text for text in texts)
        return True

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None, template_args: Any = None) -> list[int]:
        """The ids of a prompt; a prefix of those that the model was trained on."""
        ids = self._ids(self.render_prompt(messages, tools, template_args))
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
            text = self.control.shown(sample.ids[start:end].tolist(), self.decode)
            text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)  # the terminal must not obey them
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
