"""`python -m nanoft chat MODEL < questions.txt`: each line is answered separately, in batches, in order.

A plain line is a question; a blank line gets a blank answer. With --json, a line is a question as a JSON string, a list
of messages, or an object with `prompt` or `messages` (and `tools`), as in the data of rewards: an answer at the end is
not part of the question. It is written back as an object with the `answer`, the reason for its end (`finish_reason`:
stop or length), and with --compare the base model's answer, `base`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import convert
from nanoft.data.sources import BadRecord, decode_json
from nanoft.generation.generate import Answer

BATCH = 16  # lines answered together
GIVEN = ("answer", "finish_reason", "base")  # fields of the output

AnswerAll = Callable[[list[list[int]], int], list[Answer]]  # prompts, maximum number of new tokens


@dataclass(frozen=True)
class LineReader:
    chat: ChatTokenizer
    context: float  # largest number of tokens of prompt and answer together
    max_new_tokens: int
    system: str | None  # for lines without a system message of their own
    as_json: bool

    def read(self, number: int, line: bytes) -> tuple[int, dict[str, Any], list[int], int]:
        """(line number, the record to write back, the ids of its prompt, the token limit of its answer)."""
        try:
            record = _record(line) if self.as_json else {"prompt": line.decode().strip()}
            said = record.get("messages") or record["prompt"]
            asked = [{"role": "user", "content": said}] if isinstance(said, str) else said  # a text is never parsed
            read = convert({**record, "messages": asked}, "messages", None, "stdin", number, DataConfig(), "prompts")
            messages, tools = read.messages[: read.answer_at], read.tools
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            prompt = self.chat.encode_prompt(messages, tools, read.template_args)
            if tools and prompt == self.chat.encode_prompt(messages, None, read.template_args):
                raise UserError("the chat template omits tools: remove them")
            return number, record, prompt, answer_limit(prompt, self.context, self.max_new_tokens)
        except UnicodeDecodeError:
            raise UserError(f"stdin:{number}: not UTF-8: convert it, for example with iconv") from None
        except (UserError, BadRecord) as error:
            raise UserError(f"stdin:{number}: {error}") from None


def answer_limit(prompt: list[int], context: float, max_new_tokens: int) -> int:
    """The token limit of an answer; a UserError if the context has no room for any."""
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context only {context}: shorten it")
    return int(min(context - len(prompt), max_new_tokens))


def answer_lines(reader: LineReader, models: Mapping[str, AnswerAll], show: Callable[[str], None], fd: int = 0) -> None:
    """Answer every line of a file descriptor.

    models: name -> its function; the first is the model itself. If there are several, answers begin with the names.
    """
    first, cut = 1, list[int]()  # number of the next line; lines whose answer reached its limit
    for lines in read_lines(fd):
        asked = [reader.read(number, line) for number, line in enumerate(lines, first) if line.strip()]
        shown = ["" if reader.as_json else "\n"] * len(lines)  # of a blank line
        for limit, group in itertools.groupby(asked, key=lambda item: item[3]):
            numbers, records, prompts, _ = zip(*group, strict=True)
            found = [model(list(prompts), limit) for model in models.values()]
            for number, record, *answers in zip(numbers, records, *found, strict=True):
                shown[number - first] = _written(reader, record, dict(zip(models, answers, strict=True)))
                cut += [] if answers[0].stopped else [number]
        show("".join(shown))
        first += len(lines)
    if cut:
        limit = f"--max-new-tokens {reader.max_new_tokens}, or the model's context"
        print(f"{len(cut):,} answers were truncated ({limit}), first for line {cut[0]}", file=sys.stderr)


def read_lines(fd: int) -> Iterator[list[bytes]]:
    """Up to BATCH available lines at a time: another program may wait for an answer before it writes its next line."""
    rest = b""
    while piece := os.read(fd, 1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for start in range(0, len(lines), BATCH):
            yield lines[start : start + BATCH]
    if rest:
        yield [rest]


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = decode_json(line.decode())
    except BadRecord as reason:
        raise UserError(f"{reason}: without --json, lines are plain text") from None
    record = {"prompt": value} if isinstance(value, str) else {"messages": value} if isinstance(value, list) else value
    if not isinstance(record, dict) or not (record.get("prompt") or record.get("messages")):
        raise UserError("expected a string, a list of messages, or an object with prompt or messages")
    if taken := [name for name in GIVEN if name in record]:
        raise UserError(f"{taken[0]}: reserved for the output: rename the field")
    return record


def _written(reader: LineReader, record: dict[str, Any], answers: dict[str, Answer]) -> str:
    texts = {name: reader.chat.decode(answer.ids) for name, answer in answers.items()}
    if not reader.as_json:
        return "".join(f"{name}: {text}\n" if len(texts) > 1 else f"{text}\n" for name, text in texts.items())
    (tuned, answer), *base = texts.items()
    reason = "stop" if answers[tuned].stopped else "length"
    written = {**record, "answer": answer, "finish_reason": reason, **dict(base)}
    return json.dumps(written, ensure_ascii=False) + "\n"
