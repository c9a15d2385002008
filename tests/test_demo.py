"""The demo as a newcomer runs it: the command line, the figures it promises, and a quiet terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import rest_is_slow

from nanoft.config.loading import load_config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.py"


@pytest.mark.parametrize("bits", rest_is_slow([16, 4], 16))
def test_the_demo_teaches_tool_calls_and_says_so(bits: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(TINY), f"output.dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, f"quantization.bits={bits}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["base"]["exact_match"] <= 0.05
    assert report["tuned"]["exact_match"] >= 0.90
    assert report["tuned"]["stop_rate"] >= 0.99
    assert report["tuned"]["prompts"] >= 200
    assert report["base"]["target_tokens"] == report["tuned"]["target_tokens"]
    assert report["tuned"]["perplexity"] < 1.1 < report["base"]["perplexity"]

    # on stdout: what it will do, one example with its targets marked, and the comparison; nothing of other libraries
    for line in (
        r"device    \w+",
        r"training  LoRA rank 16: [\d,]+ of [\d,]+ parameters",
        r"\| tokens +\| [\d,]+ +\| [\d,]+ +\|",
    ):
        assert re.search(line, done.stdout), line
    assert re.search(r"plan      204 steps \(3 epochs\) of 32 sequences, about \d", done.stdout)
    checks = re.findall(r"^preflight (\w+) +ok ", done.stdout, re.MULTILINE)
    assert checks == ["stop", "bos", "targets", "head", "batch", "eval", "disk"]
    example = next(line for line in done.stdout.splitlines() if line.startswith("example"))
    assert re.search(r'\[INST\].*\[/INST\]⟦\{"name": ".*\}\}</s>⟧$', example)
    assert re.search(r"\| exact match +\| +\d+\.\d% +\| +\d+\.\d% +\|", done.stdout)
    assert len(re.findall(r"^ +base: ", done.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^ +tuned: ", done.stdout, re.MULTILINE)) == 3
    assert "warning" not in done.stdout

    # on stderr: the bar, with time left, loss, rate and speed, and nothing else
    frames = [frame.strip() for frame in re.split(r"[\r\n]", done.stderr) if frame.strip()]
    assert len(frames) > 3  # off a terminal, one every five seconds
    frames = [frame for frame in frames if not frame.startswith("tokenizing")]  # only where that takes a while
    bar = r"\d+%\|.*\| \d+/204 \[[\d:]+<[\d:?]+(, loss .* tok/s)?\]"
    assert [frame for frame in frames if not re.fullmatch(bar, frame)] == []
    assert re.search(r"loss \d\.\d{3}, lr \d\.\de-\d\d, [\d,]+ tok/s", frames[-1])


def test_the_demo_of_preferences_changes_how_answers_begin_and_keeps_them_right(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(TINY.with_name("tiny_dpo.py"))]
    done = subprocess.run([*command, f"output.dir={tmp_path / 'run'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    base, tuned = report["base"], report["tuned"]
    assert 0.35 <= base["pair_accuracy"] <= 0.65
    assert tuned["pair_accuracy"] >= 0.95
    name_first = next(name for name in tuned if name.startswith("regex:"))
    assert 0.35 <= base[name_first] <= 0.65
    assert tuned[name_first] >= 0.95
    assert min(base["json_equal"], tuned["json_equal"]) >= 0.95
    assert tuned["exact_match"] >= base["exact_match"]
    assert report["verdict"].startswith("better: pair accuracy from ")
    assert report["answers"]["win_rate"]["low"] > 0.5
    assert "warning" not in done.stdout


@pytest.mark.quick
def test_both_answers_of_a_pair_are_the_same_call_and_no_request_is_one_of_a_conversation() -> None:
    directory = ROOT / "configs" / "tiny"
    pairs = [json.loads(line) for line in (directory / "preferences.jsonl").read_text().splitlines()]
    for pair in pairs:
        assert json.loads(pair["chosen"]) == json.loads(pair["rejected"])
        assert [next(iter(json.loads(pair[which]))) for which in ("chosen", "rejected")] == ["name", "arguments"]
    chats = [json.loads(line)["messages"] for line in (directory / "conversations.jsonl").read_text().splitlines()]
    known = {next(message["content"] for message in chat if message["role"] == "user") for chat in chats}
    assert known.isdisjoint(pair["prompt"] for pair in pairs)
    assert len({pair["prompt"] for pair in pairs}) == len(pairs) == 1000


def test_no_held_out_prompt_is_in_the_training_data() -> None:
    config = load_config(TINY)
    d = config.data
    chat = ChatTokenizer(Path(config.model.name))
    corpus = build_datasets(d, chat, config.model.max_seq_length, config.system.seed, print)
    sides = (corpus.training, corpus.validation)
    training, held_out = (list(corpus.conversations(side)) for side in sides)
    assert len(training) + len(held_out) >= 2000
    assert len(held_out) >= 200
    answered = set()  # everything before any answer that is learned, also of an earlier turn
    for chat in training:
        turns = [(message["role"], message["content"]) for message in chat.messages]
        answered |= {tuple(turns[:at]) for at, (role, _) in enumerate(turns) if role == "assistant"}
    asked = [tuple((message["role"], message["content"]) for message in chat.messages[:-1]) for chat in held_out]
    assert answered.isdisjoint(asked)


@pytest.mark.quick
def test_the_conversations_are_tool_calls_some_with_system_messages_and_several_turns() -> None:
    lines = (ROOT / "configs" / "tiny" / "conversations.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    for chat in chats:
        for message in chat:
            if message["role"] == "assistant":
                call = json.loads(message["content"])
                assert call.keys() == {"name", "arguments"}
    assert sum(chat[0]["role"] == "system" for chat in chats) > 0.2 * len(chats)
    assert sum(sum(m["role"] == "assistant" for m in chat) > 1 for chat in chats) > 0.2 * len(chats)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "conversations.jsonl", "preferences.jsonl"]
)
def test_the_shipped_files_are_what_the_script_writes(name: str, tmp_path: Path) -> None:
    kind = "tokenizer" if name.endswith(".json") else name.removesuffix(".jsonl")
    out = tmp_path if kind == "tokenizer" else tmp_path / name
    script = ROOT / "configs" / "tiny" / "language.py"
    subprocess.run([sys.executable, str(script), kind, str(out)], check=True)
    shipped = ROOT / "configs" / "tiny" / ("base" if kind == "tokenizer" else "") / name
    assert (tmp_path / name).read_bytes() == shipped.read_bytes()


@pytest.mark.quick
def test_the_base_is_small_and_loads_in_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ROOT / "configs" / "tiny" / "base"
    assert sum(file.stat().st_size for file in base.iterdir()) <= 4 * 2**20
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "List: red, lamps, 14, Rome. Copy: red, lamps, 14, Rome"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>[INST]hello[/INST]yes</s>"


def test_a_small_corpus_is_reproducible(tmp_path: Path) -> None:
    script = ROOT / "configs" / "tiny" / "language.py"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command = [
            sys.executable,
            str(script),
            "corpus",
            str(tmp_path / name),
            "--documents",
            "50",
            "--seed",
            str(seed),
        ]
        subprocess.run(command, check=True)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    texts = [json.loads(line)["text"] for line in a.splitlines()]
    assert len(texts) == 50
    assert not any("[INST]" in text or ('"arguments"' in text and '"name"' in text) for text in texts)
