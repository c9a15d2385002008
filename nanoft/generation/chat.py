"""`python -m nanoft chat`: one answer, a conversation in the terminal, or one answer per line of a pipe.

Each time, the messages are rendered with the template of training. Text is shown as its tokens arrive; a character
whose bytes span several tokens is shown when it is complete.

From a pipe, lines are answered separately, in batches, in order; a blank line gets a blank answer. With --json, a line
is a question as a JSON string, a list of messages, or an object with `prompt` or `messages` (and `tools`), as in the
data of rewards: an answer at the end is not part of the question. It is written back as an object with the `answer`,
the reason for its end (`finish_reason`: stop or length), and with --compare the base model's answer, `base`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanoft import UserError
from nanoft.blocks.trained import Adapter
from nanoft.config import DataConfig, EvaluationConfig, SystemConfig
from nanoft.config.fields import nearest
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.data.formats import convert
from nanoft.data.sources import BadRecord, decode_json
from nanoft.generation.generate import Answer, stream
from nanoft.generation.generate import generate as generate_all
from nanoft.generation.sampling import GREEDY, NotFinite, Sampling, completion_noise
from nanoft.io.untrusted import read_json
from nanoft.kernels.decode import MEMORY_SHARE
from nanoft.lora import disabled, linears_of
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel, open_chat_tokenizer, open_model, use_cache_of
from nanoft.models.weights import cache_weights
from nanoft.runtime.device import choose_device, choose_dtype, quiet_libraries
from nanoft.runtime.memory import available_host_bytes

# prompt ids, maximum number of new tokens, sampling -> ids without the stop
Generate = Callable[[list[int], int, Sampling], Iterator[int]]
AnswerAll = Callable[[list[list[int]], int], list[Answer]]  # prompts, maximum number of new tokens
HELP = """\
/reset          new conversation with the same system message
/system TEXT    new conversation with this system message; without TEXT, with no system message
/temperature T  0: always the most likely token; above 0: sampled
/base           the base model's answer to the last question, without the adapter
/help           this list
/quit           exit, like Ctrl-D
Ctrl-C          stop an answer"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: they could control the terminal
INCOMPLETE = "\ufffd"  # what the bytes of an incomplete character decode to
BATCH = 16  # lines of a pipe that are answered together
GIVEN = ("answer", "finish_reason", "base")  # fields of the output


def run(args: argparse.Namespace) -> int:
    """`python -m nanoft chat RUN|MODEL`; returns the exit code."""
    sampling = read_sampling(args)
    if args.json and args.prompt is not None:
        raise UserError("--json: reads its prompts from standard input: remove --prompt or --json")
    for option, text in (("--prompt", args.prompt), ("--system", args.system)):
        check_text(option, text or "")
    quiet_libraries()
    use_cache_of(args.source)
    device = choose_device("auto")
    loaded = open_model(args.source, device, choose_dtype("auto", device))
    if loaded.model.config.has_score:
        raise UserError(f"{args.source}: a reward model, which generates no answers: evaluate it on pairs with eval.py")
    if args.compare and not loaded.adapters:
        raise UserError(f"--compare: {args.source} has no adapter to disable: remove --compare, or name a LoRA run")
    bytes_needed = sum(linear.out_features * linear.in_features for linear in linears_of(loaded.model).values()) * 4
    has_room = device.type == "cpu" and bytes_needed <= MEMORY_SHARE * available_host_bytes()
    policy = "cached" if has_room else "auto"  # a dequantized base is several times faster
    cache_weights(loaded.model, policy, loaded.model.head.dtype)
    chat = open_chat_tokenizer(args.source, loaded)
    chance = np.random.default_rng(args.seed)  # None: a new seed

    def noise(answers: int, limit: int) -> Tensor:
        return completion_noise(chance.integers(2**63, size=(answers, 1)).tolist(), limit)

    def generate(prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        for step in stream(loaded.model, [prompt], chat.stop_ids, limit, sampling, noise(1, limit)):
            ((_, token, _),) = step
            if token not in chat.stop_ids:
                yield token

    def answer_all(prompts: list[list[int]], limit: int) -> list[Answer]:
        return generate_all(loaded.model, prompts, chat.stop_ids, limit, sampling, noise(len(prompts), limit))

    def base_all(prompts: list[list[int]], limit: int) -> list[Answer]:
        with disabled(loaded.adapters):
            return answer_all(prompts, limit)

    context = ModelFiles.read(loaded.base_directory).fields.get("max_position_embeddings") or math.inf
    if args.prompt is None and (args.json or not sys.stdin.isatty()):
        reader = LineReader(chat, context, args.max_new_tokens, args.system, args.json)
        models = {"tuned": answer_all, **({"base": base_all} if args.compare else {})}
        answer_lines(reader, models, functools.partial(show, hides_controls=sys.stdout.isatty()))
        return 0
    session = ChatSession(
        chat, generate, loaded.adapters, args.compare, context, args.max_new_tokens, args.system, sampling
    )
    session.run(title_of(args.source, loaded)) if args.prompt is None else session.ask(args.prompt)
    return 0


def title_of(source: str, loaded: LoadedModel) -> str:
    """A run with the step of its weights, or the name of an adapter or a model."""
    best = Path(source) / "best.json"
    step = read_json(best).get("step") if loaded.step is None and best.is_file() else loaded.step
    return source if step is None else f"{source}, step {step}"


def read_sampling(args: argparse.Namespace) -> Sampling:
    """The command's sampling options; a UserError for one that is out of range or has no effect."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: getattr(args, name) for name in names}
    try:
        EvaluationConfig(max_new_tokens=args.max_new_tokens, **chosen)
        SystemConfig(seed=args.seed or 0)
    except UserError as error:  # evaluation.top_p: ...
        field, _, reason = str(error).partition(": ")
        raise UserError(f"--{field.partition('.')[2].replace('_', '-')}: {reason}") from None
    for name in ("top_k", "top_p", "min_p"):
        if args.temperature == 0 and chosen[name] != getattr(GREEDY, name):
            raise UserError(f"--{name.replace('_', '-')}: no effect at temperature 0: add --temperature 0.7")
    return Sampling(**chosen)


def stream_text(chat: ChatTokenizer, ids: Iterable[int], so_far: list[int] | None = None) -> Iterator[str]:
    """Text as its tokens arrive, which are appended to `so_far`; the pieces concatenate to the decoded ids."""
    so_far, text, shown = [] if so_far is None else so_far, "", 0  # `shown` characters have been yielded
    for token in ids:
        so_far.append(token)
        text = chat.decode(so_far)
        if len(text) > shown and not text.endswith(INCOMPLETE):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


class ChatSession:
    """A conversation, and the commands that control it."""

    def __init__(
        self, chat: ChatTokenizer, generate: Generate, adapters: dict[str, Adapter], compare: bool,
        context: float, max_new_tokens: int, system: str | None, sampling: Sampling = GREEDY,
    ):  # fmt: skip
        """`compare`: also show the base model's answers; prompt and answer together have at most `context` tokens."""
        self.chat, self.generate, self.adapters, self.compare = chat, generate, adapters, compare
        self.context, self.max_new_tokens, self.sampling = context, max_new_tokens, sampling
        self.in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> None:
        """Answer a question and add both to the conversation, which a UserError leaves unchanged."""
        check_text("stdin", question)
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = self.answer(asked, self.generate, "tuned: " if self.compare else "")
        if self.compare:
            self.answer(asked, self.generate_base, "base: ")
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def answer(self, messages: list[Message], generate: Generate, name: str) -> str:
        """Show an answer as it is generated, and return it; in a terminal, Ctrl-C stops it."""
        prompt = self.chat.encode_prompt(messages)
        limit = answer_limit(prompt, self.context, self.max_new_tokens)
        ids, text = list[int](), ""
        self.show(name)
        try:
            for piece in stream_text(self.chat, generate(prompt, limit, self.sampling), ids):
                self.show(piece)
                text += piece
        except KeyboardInterrupt:
            if not self.in_terminal:
                raise
        self.show("\n")
        if len(ids) == limit < self.max_new_tokens:
            note(f"truncated: the model's context of {self.context} tokens is full")
        elif len(ids) == limit and self.in_terminal:
            note(f"truncated after {limit} tokens (--max-new-tokens)")
        return text

    def generate_base(self, prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        with disabled(self.adapters):
            yield from self.generate(prompt, limit, sampling)

    def show(self, text: str) -> None:
        show(text, hides_controls=self.in_terminal)

    def run(self, title: str) -> None:
        """Show a banner, then answer line by line until the input ends, or /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its arrow keys
        note(f"{title}\n{self.limits()}\n{' '.join(COMMANDS)}; Ctrl-D exits")
        while (line := self.read()) is not None and line != "/quit":
            try:
                if line.startswith("/"):
                    self.run_command(*line.split(maxsplit=1))
                elif line:
                    self.ask(line)
            except NotFinite:
                raise
            except UserError as error:
                note(str(error))

    def limits(self) -> str:
        greedy = " (greedy)" * (self.sampling.temperature == 0)
        return f"temperature {self.sampling.temperature:g}{greedy}, at most {self.max_new_tokens} tokens per answer"

    def read(self) -> str | None:
        """The next line without surrounding space; None at the end."""
        try:
            return input("> ").strip()
        except EOFError:
            self.show("\n")
            return None
        except KeyboardInterrupt:  # discards what was typed
            self.show("\n")
            return ""
        except UnicodeDecodeError:
            raise UserError("stdin: not UTF-8: convert it, for example with iconv") from None

    def run_command(self, command: str, text: str = "") -> None:
        if command == "/reset":
            first = self.messages[0] if self.messages else {}
            self.reset(first["content"] if first.get("role") == "system" else None)
        elif command == "/system":
            self.reset(text)
        elif command == "/temperature":
            self.set_temperature(text)
        elif command != "/base":
            note(HELP if command == "/help" else f"{command}: unknown command{nearest(command, COMMANDS)}")
        elif not self.adapters:
            note("there is no adapter to disable")
        elif len(self.messages) < 2:
            note("there is no question yet")
        else:
            self.answer(self.messages[:-1], self.generate_base, "base: ")

    def set_temperature(self, text: str) -> None:
        try:
            temperature = float(text)
        except ValueError:
            temperature = math.nan
        if not 0 <= temperature < math.inf:
            raise UserError(f"/temperature: {text!r} is not a number >= 0: write, for example, /temperature 0.7")
        self.sampling = replace(self.sampling, temperature=temperature)
        note(self.limits())


def check_text(where: str, text: str) -> None:
    """Refuse bytes that are not UTF-8, which Python passes on as surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: not UTF-8: convert it, for example with iconv")


def show(text: str, hides_controls: bool) -> None:
    print(CONTROLS.sub(INCOMPLETE, text) if hides_controls else text, end="", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- Lines of a pipe


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
