"""One answer per line of a pipe: each line on its own, in order, in batches, as text and as JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.generation.chat import BATCH, LineReader, answer_lines
from nanoft.generation.generate import Answer, generate
from nanoft.models.weights import load_model
from tiny_models import make_chat_model, train_run, write_records

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipe") / "model"
    make_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def chat(directory: Path) -> ChatTokenizer:
    return ChatTokenizer(directory)


class Echo:
    """Answers with the prompt itself, one batch at a time."""

    def __init__(self, chat: ChatTokenizer):
        self.chat, self.batches, self.prompts = chat, list[int](), list[str]()

    def __call__(self, prompts: list[list[int]], limit: int) -> list[Answer]:
        self.batches.append(len(prompts))
        self.prompts += [self.chat.decode(prompt, keep_special=True) for prompt in prompts]
        return [Answer(prompt[:limit], 0 if len(prompt) <= limit else None) for prompt in prompts]


def reader_of(chat: ChatTokenizer, **settings: Any) -> LineReader:
    return LineReader(chat, **{"context": 10_000, "max_new_tokens": 500, "system": None, "as_json": False, **settings})


def through(reader: LineReader, echo: Echo, text: bytes, *more: str) -> str:
    """The output for an input that arrives in one piece."""
    source, target = os.pipe()
    os.write(target, text)
    os.close(target)
    shown: list[str] = []
    try:
        answer_lines(reader, dict.fromkeys(("tuned", *more), echo), shown.append, source)
    finally:
        os.close(source)
    return "".join(shown)


def test_every_line_is_a_conversation_of_its_own_and_a_blank_one_ends_nothing(chat: ChatTokenizer) -> None:
    echo = Echo(chat)
    shown = through(reader_of(chat, system="S"), echo, b"one\r\n two \n\n/reset\nlast, without an end")
    asked = ["one", "two", "/reset", "last, without an end"]
    assert echo.prompts == [
        chat.render_prompt([{"role": "system", "content": "S"}, {"role": "user", "content": text}]) for text in asked
    ]
    answers = [chat.decode(chat.encode_prompt([{"role": "system", "content": "S"}, {"role": "user", "content": t}]))
               for t in asked]  # fmt: skip
    assert shown == f"{answers[0]}\n{answers[1]}\n\n{answers[2]}\n{answers[3]}\n"
    assert echo.batches == [3, 1]


def test_lines_come_in_batches_and_answers_in_order(chat: ChatTokenizer) -> None:
    echo, count = Echo(chat), 2 * BATCH + 3
    lines = "".join(f'"question {n}"\n' for n in range(count)).encode()
    records = [json.loads(line) for line in through(reader_of(chat, as_json=True), echo, lines).splitlines()]
    assert [record["prompt"] for record in records] == [f"question {n}" for n in range(count)]
    assert all(f"question {n}" in record["answer"] for n, record in enumerate(records))
    assert echo.batches == [BATCH, BATCH, 3]


def test_json_lines_come_back_with_an_answer(chat: ChatTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "é"}]
    given = ["q", talk, {"id": 7, "prompt": "q"}, {"messages": [{"role": "system", "content": "own"}, *talk]}]
    echo = Echo(chat)
    lines = "".join(json.dumps(value) + "\n" for value in given).encode()
    records = list(
        map(json.loads, through(reader_of(chat, as_json=True, system="S"), echo, lines, "base").splitlines())
    )
    expected = [{"prompt": "q"}, {"messages": talk}, *given[2:]]
    assert [{k: v for k, v in r.items() if k not in ("answer", "finish_reason", "base")} for r in records] == expected
    assert [record["finish_reason"] for record in records] == ["stop"] * 4
    assert all(record["answer"] == record["base"] for record in records)
    systems = ["S", "S", "S", "own"]
    assert [prompt.split("<|im_end|>")[0].split("\n")[1] for prompt in echo.prompts[:4]] == systems
    assert capsys.readouterr().err == ""
    records = list(map(json.loads, through(reader_of(chat, as_json=True, max_new_tokens=3), echo, lines).splitlines()))
    assert [record["finish_reason"] for record in records] == ["length"] * 4
    assert "4 answers were truncated (--max-new-tokens 3" in capsys.readouterr().err


def test_an_answer_at_the_end_is_not_shown_to_the_model(chat: ChatTokenizer) -> None:
    question = {"role": "user", "content": "a"}
    record = {"messages": [question, {"role": "assistant", "content": "b"}], "id": 7}
    echo = Echo(chat)
    (line,) = through(reader_of(chat, as_json=True), echo, json.dumps(record).encode()).splitlines()
    assert echo.prompts == [chat.render_prompt([question])]
    assert json.loads(line).items() >= record.items()


def test_an_answer_may_use_what_the_context_leaves(chat: ChatTokenizer) -> None:
    length = len(chat.encode_prompt([{"role": "user", "content": "long question"}]))
    limits: list[int] = []

    def answer(prompts: list[list[int]], limit: int) -> list[Answer]:
        limits.append(limit)
        return [Answer([], 0) for _ in prompts]

    source, target = os.pipe()
    os.write(target, b"long question\nlong question\nq\n")
    os.close(target)
    answer_lines(reader_of(chat, context=length + 5, max_new_tokens=6), {"tuned": answer}, print, source)
    assert limits == [5, 6]
    os.close(source)


MISTAKES = {
    b"plain\n": "stdin:2: not valid JSON",
    b'{"question": "q"}\n': "stdin:2: expected a string, a list of messages, or an object with prompt or messages",
    b"7\n": "stdin:2: expected a string",
    b"[]\n": "stdin:2: expected a string, a list of messages",
    b'[{"role": "user"}]\n': "stdin:2: messages: ",
    b'[{"role": "assistant", "content": "b"}]\n': "stdin:2: the first message is from the assistant",
    b'{"prompt": "a", "answer": "b"}\n': "stdin:2: answer: reserved for the output: rename the field",
    b'{"prompt": "a", "tools": 5}\n': "stdin:2: tools: expected a list of functions with names",
    b'{"prompt": "a", "tools": [{"name": "f"}]}\n': "stdin:2: the chat template omits tools: remove them",
    b"\xff\n": "stdin:2: not UTF-8",
    b'"' + b"x" * 300 + b'"\n': "stdin:2: the prompt has ",
    b'[{"role": "user", "content": ' + b"1" * 400 + b"}]\n": "stdin:2: the prompt has ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_line_that_cannot_be_answered_is_named(chat: ChatTokenizer, line: bytes) -> None:
    with pytest.raises(UserError) as caught:
        through(reader_of(chat, as_json=True, context=200), Echo(chat), b'"fine"\n' + line)
    assert MISTAKES[line] in str(caught.value)


def run(arguments: list[str], typed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanoft", "chat", *arguments, "--max-new-tokens", "8"]
    return subprocess.run(command, input=typed, capture_output=True, text=True)


def test_the_command_answers_as_one_by_one(directory: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    model = load_model(directory, CPU, torch.float32).eval()
    questions = ["Say 4 please.", "Hello", "What?"]
    prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in questions]
    alone = [chat.decode(generate(model, [prompt], chat.stop_ids, 8)[0].ids) for prompt in prompts]
    done = run([str(directory), "--json"], "".join(f"{json.dumps(text)}\n" for text in questions))
    assert (done.returncode, [json.loads(line)["answer"] for line in done.stdout.splitlines()]) == (0, alone)
    trained = train_run(tmp_path / "run", directory, write_records(tmp_path / "data.jsonl"))
    both = [json.loads(line) for line in run([str(trained), "--json", "--base"], '"Hello"\n').stdout.splitlines()]
    assert both[0]["base"] == alone[1] != both[0]["answer"]


def test_damaged_weights_are_not_an_empty_answer(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    done = run([str(tmp_path)], "hello\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
