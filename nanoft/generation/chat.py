"""A conversation in the terminal, or line by line through a pipe.

What was said is kept as messages and rendered by the training template each time, so the model sees what it was trained
on. Text appears as its tokens come; a character whose bytes are spread over several tokens waits until it is whole. A
talk that outgrows the model's context loses its oldest exchanges, and that is said.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.lora import LoRALinear, disabled

Speak = Callable[[list[int], int], Iterator[int]]  # prompt ids and a limit to the answer's ids, without the stop
HELP = """\
/reset        a new talk, with the same system message
/system TEXT  a new talk, with this system message; without TEXT, with none
/base         what the base says to the last question, without the adapter
/help         this
/quit         the end, as Ctrl-D
Ctrl-C        the end of an answer"""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line: a terminal would obey them
UNFINISHED = "\ufffd"  # what bytes that are no character yet decode to


def stream_text(chat: ChatTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come; all pieces together are the decoded ids."""
    so_far: list[int] = []
    text, told = "", 0  # `told` characters of the text have been yielded
    for token in ids:
        so_far.append(token)
        text = chat.decode(so_far)
        if len(text) > told and not text.endswith(UNFINISHED):
            yield text[told:]
            told = len(text)
    if len(text) > told:
        yield text[told:]


class ChatSession:
    """Questions and answers, and the commands between them."""

    def __init__(
        self,
        chat: ChatTokenizer,
        speak: Speak,
        adapters: dict[str, LoRALinear],
        beside: bool,
        context: float,
        max_new_tokens: int,
        system: str | None,
    ):
        """
        Args:
            adapters: what to switch off for the base's answers.
            beside: let the base answer every question, too.
            context: tokens that prompt and answer may have together.
        """
        self.chat, self.speak, self.adapters, self.beside = chat, speak, adapters, beside
        self.context, self.max_new_tokens = context, max_new_tokens
        self.in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.messages: list[Message] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """A new talk."""
        self.messages = [{"role": "system", "content": system}] if system else []

    # ---- Answers

    def ask(self, question: str) -> None:
        """Answer a question, as part of the talk.

        Raises:
            UserError: it does not fit into the context, or the template refuses it; it is then not part of the talk.
        """
        check_text("stdin", question)
        self.messages.append({"role": "user", "content": question})
        try:
            prompt, limit = self.fit()
        except UserError:
            self.messages.pop()
            raise
        said = self.say(self.speak, prompt, limit, "tuned: " if self.beside else "")
        if self.beside:
            self.say(self.base, prompt, limit, "base: ")
        self.messages.append({"role": "assistant", "content": said})

    def fit(self) -> tuple[list[int], int]:
        """The prompt's ids and the answer's limit; leaves out the oldest exchanges if they are too many."""
        wanted, forgotten = min(self.max_new_tokens, self.context // 4), 0  # tokens to keep free for the answer
        while True:
            prompt = self.chat.encode_prompt(self.messages)
            room = self.context - len(prompt)
            questions = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
            if room >= wanted or len(questions) == 1:
                break
            del self.messages[questions[0] : questions[1]]
            forgotten += 1
        if room < 1:
            raise UserError(f"the prompt has {len(prompt)} tokens, the model's context {self.context}: shorten it")
        if forgotten:
            what = "question no longer fits" if forgotten == 1 else f"{forgotten} questions no longer fit"
            note(f"the oldest {what} into {self.context} tokens: forgotten")
        return prompt, int(min(room, self.max_new_tokens))

    def say(self, speak: Speak, prompt: list[int], limit: int, name: str) -> str:
        """Show an answer as it comes; in a terminal Ctrl-C ends it."""
        ids: list[int] = []
        pieces: list[str] = []

        def kept() -> Iterator[int]:
            for token in speak(prompt, limit):
                ids.append(token)
                yield token

        self.show(name)
        try:
            for piece in stream_text(self.chat, kept()):
                self.show(piece)
                pieces.append(piece)
        except KeyboardInterrupt:
            if not self.in_terminal:
                raise
        self.show("\n")
        if len(ids) == limit < self.max_new_tokens:
            note(f"cut short: the model's context of {self.context} tokens is full")
        elif len(ids) == limit and self.in_terminal:
            note(f"cut short after {limit} tokens: see --max-new-tokens")
        return "".join(pieces)

    def base(self, prompt: list[int], limit: int) -> Iterator[int]:
        """`speak`, with the adapters switched off."""
        with disabled(self.adapters):
            yield from self.speak(prompt, limit)

    def show(self, text: str) -> None:
        print(CONTROLS.sub(UNFINISHED, text) if self.in_terminal else text, end="", flush=True)

    # ---- Lines

    def run(self) -> None:
        """Answer line by line until the input ends, or /quit, or an empty line that comes through a pipe."""
        if self.in_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() its arrow keys
            note("/help lists the commands, Ctrl-D ends")
        while (line := self.read()) is not None and line != "/quit":
            try:
                if line.startswith("/") and (self.in_terminal or line.split()[0] in HELP.split()):
                    self.obey(*line.split(maxsplit=1))
                elif line:
                    self.ask(line)
            except UserError as error:
                if not self.in_terminal:
                    raise
                note(str(error))

    def read(self) -> str | None:
        """The next line without the space around it; None: there is none."""
        try:
            line = input("> " if self.in_terminal else "").strip()
        except EOFError:
            self.show("\n" if self.in_terminal else "")
            return None
        except KeyboardInterrupt:  # forgets what was typed
            if not self.in_terminal:
                raise
            self.show("\n")
            return ""
        except UnicodeDecodeError:
            raise UserError("stdin: not UTF-8: convert it, for example with iconv") from None
        return line if line or self.in_terminal else None

    def obey(self, command: str, text: str = "") -> None:
        """Do what a line that begins with / says."""
        if command == "/reset":
            first = self.messages[0] if self.messages else {}
            self.begin(first["content"] if first.get("role") == "system" else None)
        elif command == "/system":
            self.begin(text)
        elif command == "/base":
            self.hear_base()
        else:
            note(HELP if command == "/help" else f"{command}: no such command\n{HELP}")

    def hear_base(self) -> None:
        """The base's answer to the last question."""
        if not self.adapters:
            note("there is no adapter to switch off")
        elif len(self.messages) < 2:
            note("nothing was asked yet")
        else:
            prompt = self.chat.encode_prompt(self.messages[:-1])
            self.say(self.base, prompt, int(min(self.context - len(prompt), self.max_new_tokens)), "base: ")


def check_text(where: str, text: str) -> None:
    """Refuse what came as bytes that are no UTF-8: Python passes them on as half characters."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: not UTF-8: convert it, for example with iconv")


def note(text: str) -> None:
    """A word that is no part of the talk."""
    print(text, file=sys.stderr, flush=True)
