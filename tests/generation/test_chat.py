"""The chat in a terminal and through a pipe: output, history, commands."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from nanoft import UserError
from nanoft.__main__ import main
from nanoft.config import LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.generation.chat import HELP, ChatSession, stream_text
from nanoft.generation.sampling import Sampling
from nanoft.lora import LoRALinear, inject_lora
from nanoft.model import Decoder
from nanoft.models.families import decoder_config
from tiny_models import make_chat_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    make_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def chat(directory: Path) -> ChatTokenizer:
    return ChatTokenizer(directory)


# ---- Text as it comes


def byte_tokens(chat: ChatTokenizer, text: str) -> list[int]:
    """Encode each byte as one token, without the tokenizer's merges."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [chat.tokenizer.token_to_id(spelled) for piece, _ in pieces for spelled in piece]
    assert None not in ids
    return ids


TEXTS = ["plain", "naïve café", "👩‍👩‍👧 family", "日本語のテキスト", "ends in 🎉", "\n\n  spaces \t", "", "a�b"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(chat: ChatTokenizer, text: str) -> None:
    ids = byte_tokens(chat, text)
    pieces = list(stream_text(chat, ids))
    assert "".join(pieces) == chat.decode(ids) == text
    if "�" not in text:
        assert pieces == list(text)  # a byte a token: every piece is one character


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_with_the_tokenizers_own_tokens(chat: ChatTokenizer, text: str) -> None:
    ids = chat.tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(stream_text(chat, ids)) == chat.decode(ids)


def test_bytes_that_are_no_character_come_out_as_they_are_decoded(chat: ChatTokenizer) -> None:
    ids = byte_tokens(chat, "ab🎉")[:-1] + byte_tokens(chat, "c") + byte_tokens(chat, "é")[:1]
    pieces = list(stream_text(chat, ids))
    assert "".join(pieces) == chat.decode(ids)
    assert pieces[:2] == ["a", "b"]
    assert "�" in chat.decode(ids)


def test_pieces_come_at_once(chat: ChatTokenizer) -> None:
    given = []

    def one_by_one() -> Iterator[int]:
        for token in byte_tokens(chat, "a🎉b"):
            given.append(token)
            yield token

    assert [(piece, len(given)) for piece in stream_text(chat, one_by_one())] == [("a", 1), ("🎉", 5), ("b", 6)]


# ---- A conversation with a model whose answers are written down


class Script:
    """Says its lines one after another; remembers the prompts and whether the adapters were on."""

    def __init__(self, chat: ChatTokenizer, lines: list[str], adapters: dict[str, LoRALinear]):
        self.chat, self.lines, self.adapters = chat, iter(lines), adapters
        self.asked: list[tuple[str, int, bool]] = []
        self.temperatures: list[float] = []

    def __call__(self, prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        self.temperatures.append(sampling.temperature)
        switched_on = all(adapter.enabled for adapter in self.adapters.values())
        self.asked.append((self.chat.decode(prompt, keep_special=True), limit, switched_on))
        yield from byte_tokens(self.chat, next(self.lines))[:limit]


@pytest.fixture
def adapters() -> dict[str, LoRALinear]:
    shape = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, **shape}
    return inject_lora(Decoder(decoder_config(config)), LoRAConfig(rank=2), seed=0)


def session_of(chat: ChatTokenizer, script: Script, **settings: Any) -> ChatSession:
    chosen = {"compare": False, "context": 10_000, "max_new_tokens": 50, "system": None, **settings}
    return ChatSession(chat, script, script.adapters, **chosen)


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def assistant(text: str) -> str:
    return f"<|im_start|>assistant\n{text}<|im_end|>\n"


OPEN = "<|im_start|>assistant\n"
BANNER = """\
runs/some, step 8
temperature 0 (greedy), at most 50 tokens per answer
/reset /system /temperature /base /help /quit; Ctrl-D exits
"""
KNOWN = ": choose one of /reset, /system, /temperature, /base, /help, /quit"


def run_lines(session: ChatSession, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    session.in_terminal = True
    session.run("runs/some, step 8")


def test_commands(
    chat: ChatTokenizer,
    adapters: dict[str, LoRALinear],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = Script(chat, ["A1", "B1", "A2", "A3", "A4"], adapters)
    lines = ["/base", "q1", "/base", "/reset", "q2", "/system be  brief", "q3", "/reset", "q4", "/system"]
    run_lines(session_of(chat, script), "\n".join([*lines, "/etc/passwd?", "/help", "/quit", "q6"]), monkeypatch)
    out, err = capsys.readouterr()
    assert out.replace("> ", "") == "A1\nbase: B1\nA2\nA3\nA4\n"
    assert err.removeprefix(BANNER) == f"there is no question yet\n/etc/passwd?: unknown command{KNOWN}\n{HELP}\n"
    brief = "<|im_start|>system\nbe  brief<|im_end|>\n"
    assert script.asked == [
        (user("q1") + OPEN, 50, True),
        (user("q1") + OPEN, 50, False),
        (user("q2") + OPEN, 50, True),
        (brief + user("q3") + OPEN, 50, True),
        (brief + user("q4") + OPEN, 50, True),
    ]
    assert all(adapter.enabled for adapter in adapters.values())


def test_the_temperature_is_changed_from_the_next_answer_on(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(chat, ["A", "B", "C"], {})
    typed = [
        "q1",
        "/temperature 0.7",
        "q2",
        "/temperature hot",
        "/temperature -1",
        "/temprature 1",
        "/temperature 0",
        "q3",
    ]
    run_lines(session_of(chat, script), "\n".join(typed), monkeypatch)
    assert script.temperatures == [0.0, 0.7, 0.0]
    assert capsys.readouterr().err.removeprefix(BANNER).splitlines() == [
        "temperature 0.7, at most 50 tokens per answer",
        "/temperature: 'hot' is not a number >= 0: write, for example, /temperature 0.7",
        "/temperature: '-1' is not a number >= 0: write, for example, /temperature 0.7",
        "/temprature: unknown command: did you mean /temperature?",
        "temperature 0 (greedy), at most 50 tokens per answer",
    ]


def test_the_base_answer_is_not_part_of_the_conversation(
    chat: ChatTokenizer, adapters: dict[str, LoRALinear], capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(chat, ["T1", "B1", "T2", "B2"], adapters)
    session = session_of(chat, script, compare=True)
    session.ask("q1")
    session.ask("q2")
    assert capsys.readouterr().out == "tuned: T1\nbase: B1\ntuned: T2\nbase: B2\n"
    assert script.asked[3] == (user("q1") + assistant("T1") + user("q2") + OPEN, 50, False)


def test_a_question_larger_than_the_context_is_refused_and_not_remembered(
    chat: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(chat, ["yes" * 20], {})
    session = session_of(chat, script, context=60)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the model's context only 60: shorten it"):
        session.ask("y" * 200)
    assert session.messages == []
    session.ask("hi")
    left = 60 - len(chat.encode_prompt([{"role": "user", "content": "hi"}]))
    assert script.asked == [(user("hi") + OPEN, min(left, 50), True)]
    out, err = capsys.readouterr()
    assert len(byte_tokens(chat, out)) == left + 1
    assert err == "truncated: the model's context of 60 tokens is full\n"


def test_input_that_is_no_text_is_one_line(chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="stdin: not UTF-8"):
        session_of(chat, Script(chat, [], {})).run("MODEL")
    with pytest.raises(UserError, match="stdin: not UTF-8"):  # in the C locale it comes like this
        session_of(chat, Script(chat, [], {})).ask(b"\xff".decode(errors="surrogateescape"))


class Interrupted(Script):
    """Ctrl-C comes after the first three tokens."""

    def __call__(self, prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        for number, token in enumerate(super().__call__(prompt, limit, sampling)):
            if number == 3:
                raise KeyboardInterrupt
            yield token


def test_ctrl_c_in_a_terminal_ends_the_answer_and_what_was_said_stays(
    chat: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Interrupted(chat, ["long answer", "an"], {})
    session = session_of(chat, script)
    session.in_terminal = True
    session.ask("q1")
    session.ask("q2")
    assert capsys.readouterr().out == "lon\nan\n"
    assert script.asked[1][0] == user("q1") + assistant("lon") + user("q2") + OPEN
    piped = session_of(chat, Interrupted(chat, ["long answer"], {}))
    with pytest.raises(KeyboardInterrupt):
        piped.ask("q1")


# ---- The program itself, in a terminal


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "nanoft", "chat", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.shown = ""

    def until(self, text: str, timeout_s: float = 120) -> str:
        """The output up to and including a text."""
        end = time.monotonic() + timeout_s
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            self.shown += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def interrupt(self) -> None:
        """Send Ctrl-C until there is output: Python misses one that arrives just before it waits for keys."""
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            if select.select([self.master], [], [], 3)[0]:
                return


def test_a_terminal_has_prompt_signs_and_ctrl_c_does_not_end_the_program(directory: Path) -> None:
    terminal = Terminal(str(directory), "--max-new-tokens", "200")
    try:
        terminal.until("temperature 0 (greedy), at most 200 tokens per answer")
        terminal.until("Ctrl-D exits")
        terminal.until("> ")
        terminal.type("/nonsense")
        assert "/nonsense: unknown command" in terminal.until("> ")
        terminal.type("/base")
        assert "there is no adapter to disable" in terminal.until("> ")
        terminal.type("")  # an empty line ends nothing here
        terminal.until("> ")
        terminal.type("hello")
        terminal.until("> ")
        terminal.interrupt()  # at the prompt it only forgets what was typed
        terminal.until("> ")
        terminal.type("/quit")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_what_a_terminal_would_obey_is_not_sent_to_it(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(chat, ["a\x1b[31mb\nc\td\x07"] * 2, {})
    session = session_of(chat, script)
    session.ask("q")
    assert capsys.readouterr().out == "a\x1b[31mb\nc\td\x07\n"
    session.in_terminal = True
    session.ask("q")
    assert capsys.readouterr().out == "a\ufffd[31mb\nc\td\ufffd\n"


def test_the_command_draws_the_same_again_for_a_seed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        options = ["--temperature", "2", "--prompt", "Say 4.", "--max-new-tokens", "12", *more]
        assert main(["chat", str(directory), *options]) == 0
        return capsys.readouterr().out

    assert said("--seed", "1") == said("--seed", "1") != said("--seed", "2")
    assert len({said() for _ in range(3)}) > 1
