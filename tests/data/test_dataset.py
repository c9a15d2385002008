"""Files to samples: what is kept, what is skipped and why, the split, and a cache that is never stale."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import NEXT_ROLE, STYLES, TINY, Style, save

from nanoft import UserError
from nanoft.batches import Batches, Sample
from nanoft.config import DataConfig
from nanoft.data import builder, dataset
from nanoft.data.builder import REJECTED
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets, describe_data
from nanoft.data.formats import Conversation

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "tiny" / "conversations.jsonl"


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(TINY)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pair(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **fields}


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def write(path: Path, records: list[Any]) -> str:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def build(chat: ChatTokenizer, file: str | Path, limit: int = 512, seed: int = 0, **changes: Any) -> PreparedDataset:
    fields = {"validation_split": 0.0, **changes}
    return build_datasets(DataConfig(train_file=str(file), **fields), chat, limit, seed, print)


def lines_of(found: PreparedDataset, samples: Any) -> list[int]:
    return [int(found.location(record).rpartition(":")[2]) for record in samples.records.tolist()]


def rejected(found: PreparedDataset) -> list[tuple[str, int]]:
    entries = [json.loads(line) for line in (found.directory / REJECTED).read_text(encoding="utf-8").splitlines()]
    assert all(entry.keys() == {"kind", "reason", "file", "line"} for entry in entries)
    return [(entry["kind"], entry["line"]) for entry in entries]


# ---- Samples


def test_samples_are_those_of_the_tokenizer_in_the_order_of_the_file(chat: ChatTokenizer) -> None:
    found = build(chat, DEMO, max_samples=300)
    messages = [json.loads(line)["messages"] for line in DEMO.read_text().splitlines()[:300]]
    expected = [s for n, m in enumerate(messages) for s in chat.encode_now(chat.render_samples(m, n))]
    assert len(found.training) == len(expected) == 300
    for sample, reference in zip(found.training, expected, strict=True):
        assert sample.ids.tolist() == reference.ids.tolist()
        assert sample.is_target.tolist() == reference.is_target.tolist()
    assert lines_of(found, found.training) == list(range(1, 301))
    report = found.report["training"]
    assert report["tokens"] == sum(len(s.ids) for s in expected)
    assert report["target_tokens"] == sum(int(s.is_target.sum()) for s in expected)
    assert report["length"]["p100"] == max(len(s.ids) for s in expected)


def test_the_garbage_collector_works_as_before_after_a_build(chat: ChatTokenizer, tmp_path: Path) -> None:
    before = gc.get_threshold()
    build(chat, write(tmp_path / "good.jsonl", [pair("a")]))
    with pytest.raises(UserError):
        build(chat, write(tmp_path / "bad.jsonl", [pair("a"), "{"]))
    assert gc.get_threshold() == before


def test_conversations_come_back_from_their_files(chat: ChatTokenizer, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [pair(f"a{n}") for n in range(20)])
    second = write(tmp_path / "b.jsonl", ["", *[pair(f"b{n}") for n in range(20)]])
    found = build(chat, f"{first},{second}", validation_split=0.5)
    for side in (found.training, found.validation):
        conversations = list(found.conversations(side))
        assert [c.file for c in conversations] == [found.location(r).rpartition(":")[0] for r in side.records.tolist()]
        assert [c.line for c in conversations] == lines_of(found, side)
        texts = [chat.decode(sample.ids.tolist(), keep_special=True) for sample in side]
        assert texts == [chat.render(c.messages) for c in conversations]


def test_several_samples_of_one_record(tmp_path: Path) -> None:
    chat = ChatTokenizer(save(tmp_path / "qwen", STYLES["qwen"]))
    turns = talk("a", "<think>\nh\n</think>\n\nb", "c", "d")
    found = build(chat, write(tmp_path / "d.jsonl", [{"messages": turns[:2]}, {"messages": turns}]))
    assert lines_of(found, found.training) == [1, 2, 2]
    assert len(list(found.conversations(found.training))) == 2


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_what_is_trained_on(chat: ChatTokenizer, tmp_path: Path, train_on: str) -> None:
    turns = talk("a", "b", "c", "d")
    found = build(chat, write(tmp_path / "d.jsonl", [{"messages": turns}]), train_on=train_on)
    shown = chat.highlight_targets(found.training[0], color=False)
    expected = {
        "assistant": "<s>[INST]a[/INST]⟦b</s>⟧[INST]c[/INST]⟦d</s>⟧",
        "last_assistant": "<s>[INST]a[/INST]b</s>[INST]c[/INST]⟦d</s>⟧",
        "all": "<s>⟦[INST]a[/INST]b</s>[INST]c[/INST]d</s>⟧",
    }
    assert shown == expected[train_on]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + str(STYLES["chatml"].template)
    chat = ChatTokenizer(save(tmp_path / "m", Style(template, None, "<|im_end|>", "<|im_end|>")))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    found = build(chat, write(tmp_path / "d.jsonl", [{"messages": turns, "tools": [tool]}]))
    assert chat.decode(found.training[0].ids.tolist()).startswith("look_up ")
    assert next(found.conversations(found.training)).tools == [tool]


# ---- What is left out


def test_everything_that_is_left_out_is_counted_and_written_down(chat: ChatTokenizer, tmp_path: Path) -> None:
    records: list[Any] = [pair(f"question {n} of many") for n in range(60)]
    records[3] = "{no JSON"
    records[7] = records[6]  # the same again
    records[11] = pair("x", "y")  # two characters
    records[13] = pair("a" * 3000, "b")
    records[17] = pair("many tokens " * 60, "b")
    found = build(
        chat, write(tmp_path / "d.jsonl", records), limit=100, min_characters=3, max_characters=2000, min_tokens=2
    )
    expected = {4: "malformed", 8: "duplicate", 12: "too short", 14: "too many characters", 18: "too long"}
    assert {line: kind for kind, line in rejected(found)} == expected
    assert found.report["removed"] == dict.fromkeys(expected.values(), 1)
    assert found.report["read"] == 60
    assert lines_of(found, found.training) == [line for line in range(1, 61) if line not in expected]
    said = "\n".join(describe_data(found.report))
    for kind in expected.values():
        assert f"removed: {kind}" in said
    assert "read 60 records (prompt_completion: prompt, completion) from " in said
    assert f"warning: {tmp_path / 'd.jsonl'}:4: not valid JSON" in said


def test_duplicates_may_stay(chat: ChatTokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [pair("a"), pair("a"), pair("b")])
    assert len(build(chat, file).training) == 2
    assert len(build(chat, file, deduplicate=False).training) == 3


def test_labels_choose_and_are_no_mistakes(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair(f"q{n}", label=n % 3 != 0) for n in range(30)]
    found = build(chat, write(tmp_path / "d.jsonl", records), label_field="label", max_bad_records=0.0)
    assert len(found.training) == 20
    assert found.report["removed"] == {"undesirable label": 10}
    records[4]["label"] = "perhaps"
    with pytest.raises(UserError, match=r"d\.jsonl:5: label: 'perhaps'"):
        build(chat, write(tmp_path / "d.jsonl", records), label_field="label", max_bad_records=0.0)


@pytest.mark.parametrize("limit", ["quality:0.5", " quality : 5e-1 "])
def test_a_score_chooses_and_a_record_without_one_is_malformed(chat: ChatTokenizer, tmp_path: Path, limit: str) -> None:
    scores = [0.4, 0.5, "0.6", 0, 1, -3, "1e3"]  # texts: as in CSV files
    records = [pair(f"q{n}", quality=score) for n, score in enumerate(scores)]
    found = build(chat, write(tmp_path / "d.jsonl", records), min_score=limit, max_bad_records=0.0)
    assert questions(found, found.training) == ["q1", "q2", "q4", "q6"]
    assert rejected(found) == [("below data.min_score", 1), ("below data.min_score", 4), ("below data.min_score", 6)]
    assert "| removed: below data.min_score | 3 |" in re.sub(" +", " ", describe_data(found.report)[-1])
    for odd in (None, "high", True, [1], "nan"):
        file = write(tmp_path / "odd.jsonl", [*records, pair("q", quality=odd)])
        with pytest.raises(UserError, match=r"odd\.jsonl:8: quality: .* is not a number \(data\.min_score\)"):
            build(chat, file, min_score=limit, max_bad_records=0.0)
        assert build(chat, file, min_score=limit, max_bad_records=0.2).report["removed"]["malformed"] == 1
    for share in (0.05, 1.0):
        with pytest.raises(UserError, match=r"rank: None is not a number|none of 7 records is left"):
            build(chat, tmp_path / "d.jsonl", min_score="rank:0.5", max_bad_records=share)


def test_samples_with_few_target_tokens_are_counted(chat: ChatTokenizer, tmp_path: Path) -> None:
    answers = ["yes it is", "no", "perhaps it is so", "no", "I do not know that"]
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}", answer) for n, answer in enumerate(answers)])
    counts = [int(sample.is_target.sum()) for sample in build(chat, file, deduplicate=False).training]
    least = counts[1] + 1  # "no" and the end of the turn have one less
    found = build(chat, file, deduplicate=False, min_target_tokens=least)
    assert [int(sample.is_target.sum()) for sample in found.training] == [n for n in counts if n >= least]
    what = f"a sample has fewer than data.min_target_tokens={least} and is skipped"
    assert f"warning: {what}: 2 records, first {tmp_path}/d.jsonl:2" in describe_data(found.report)
    assert found.report["removed"] == {"too few target tokens": 2}
    with pytest.raises(UserError, match=r"none of 5 records is left \(5 too few target tokens\)"):
        build(chat, file, deduplicate=False, min_target_tokens=100)


def test_garbled_text_and_repetition_are_counted(chat: ChatTokenizer, tmp_path: Path) -> None:
    stuck = "I am sorry, I cannot do that. " * 12
    records = [
        pair("q0"),
        pair("q1", "Un cafÃ©"),
        pair("q2 â€™"),
        pair("q3", stuck),
        {"prompt": stuck, "completion": "a"},
    ]
    found = build(chat, write(tmp_path / "d.jsonl", records))
    assert found.report["notes"] == [
        ["a text looks like UTF-8 decoded with another encoding (Ã©, â€™), or has U+FFFD", 2, f"{tmp_path}/d.jsonl:2"],
        ["an answer repeats one phrase over and over", 1, f"{tmp_path}/d.jsonl:4"],
    ]


def test_columns_are_mapped(chat: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("q;a;s\nHello;Hi;Be kind\nBye;See you;Be kind\n")
    columns = {"instruction": "q", "response": "a", "system": "s"}
    found = build(chat, tmp_path / "d.csv", columns=columns)
    assert [m["content"] for m in next(found.conversations(found.training)).messages] == ["Be kind", "Hello", "Hi"]
    assert "(alpaca: system, instruction, output (response))" in describe_data(found.report)[0]


def test_ignored_labels_stratify_nothing(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair(f"q{n}", label=n % 2 == 0) for n in range(20)]
    found = build(chat, write(tmp_path / "d.jsonl", records), label_field="ignore", validation_split=0.2)
    assert (len(found.training), len(found.validation), found.report["removed"]) == (16, 4, {})


def test_control_characters_are_kept_and_counted(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair("q0"), pair("q1", "\x1b[31mred\x1b[0m"), pair("q\x072")]
    found = build(chat, write(tmp_path / "d.jsonl", records))
    sample = found.training[1]
    assert chat.decode(sample.ids[sample.is_target].tolist()) == "\x1b[31mred\x1b[0m"
    said = f"warning: control characters are kept: 2 records, first {tmp_path}/d.jsonl:2"
    assert said in describe_data(found.report)
    assert chat.highlight_targets(sample, color=False).endswith("⟦\\x1b[31mred\\x1b[0m</s>⟧")


def test_only_the_training_split_of_a_directory_is_trained_on(chat: ChatTokenizer, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write(tmp_path / "data" / f"{split}.jsonl", [pair(f"{split} {n}") for n in range(4)])
    said: list[str] = []
    data = DataConfig(train_file=str(tmp_path / "data"), validation_file=str(tmp_path / "data"))
    for _ in range(2):  # also from the cache
        found = build_datasets(data, chat, 512, 0, said.append)
        assert {c.prompt() for c in found.conversations(found.training)} == {f"train {n}" for n in range(4)}
        assert {c.prompt() for c in found.conversations(found.validation)} == {f"validation {n}" for n in range(4)}
    assert said[0].endswith("/data: reading only its train split, not test.jsonl, validation.jsonl")
    assert said[1].endswith("/data: reading only its validation split, not test.jsonl, train.jsonl")
    assert len(said) == 4


def test_a_raw_pair_is_learned_without_the_template(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair("2+2=", "4"), pair("Once upon", " a time </s>")]
    file = write(tmp_path / "d.jsonl", records)
    found = build(chat, file, format="raw_prompt_completion", packing=True)
    for sample, record in zip(found.training, records, strict=True):
        ids = sample.ids.tolist()
        start = int(sample.is_target.argmax())
        assert ids[:start] == [chat.bos_id, *chat.tokenizer.encode(record["prompt"], add_special_tokens=False).ids]
        assert ids[-1] == chat.eos_id
        assert chat.decode(ids[start:-1], keep_special=True) == record["completion"]
        assert ids.count(chat.eos_id) == 1
        assert sample.is_target[start:].all()
    with pytest.raises(UserError, match="2 too long"):
        build(chat, file, limit=4, format="raw_prompt_completion", truncation="prompt")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_too_many_malformed_records_stop_the_run_and_show_five(
    chat: ChatTokenizer, tmp_path: Path, share: float
) -> None:
    bad = 30 if share == 0.5 else 4
    records: list[Any] = [pair(f"q{n}") for n in range(56 - bad + 4 if bad == 4 else 29)]
    file = write(tmp_path / "d.jsonl", records + [pair(f"bad {n}", "") for n in range(bad)])
    total = len(records) + bad
    with pytest.raises(UserError) as caught:
        build(chat, file, max_bad_records=share)
    said = str(caught.value)
    assert said.startswith(f"{file}:{len(records) + 1}: ")
    assert f"({bad} of {total} records are malformed, more than data.max_bad_records={share}" in said
    assert said.count(f"{file}:") == min(bad, 5)
    assert "\n" not in said
    assert len(build(chat, file, max_bad_records=0.9).training) == len(records)


def test_what_the_template_refuses_or_swallows_is_not_called_malformed(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "{% if m.content != 'nothing' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    chat = ChatTokenizer(save(tmp_path / "m", Style(template, None, "<|im_end|>", "<|im_end|>")))
    records = [pair(f"q{n}", "fine") for n in range(38)] + [pair("a", "no"), pair("b", "nothing")]
    found = build(chat, write(tmp_path / "d.jsonl", records))
    assert rejected(found) == [("refused by the chat template", 39), ("refused by the chat template", 40)]
    said = r"d\.jsonl:39: .* refuses these messages: not this \(the chat template refuses 2 of 40 records, more than"
    with pytest.raises(UserError, match=said):
        build(chat, tmp_path / "d.jsonl", max_bad_records=0.04)


def test_a_conversation_in_which_nothing_is_to_be_learned(chat: ChatTokenizer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    file = write(tmp_path / "d.jsonl", [{"messages": turns}, {"messages": [turns[0], {**turns[1], "weight": 1}]}])
    found = build(chat, file, max_bad_records=0.5, deduplicate=False)
    assert rejected(found) == [("malformed", 1)]


@pytest.mark.parametrize(
    ("truncation", "fix"), [("drop", "raise it, or set data.truncation=prompt"), ("prompt", "raise it")]
)
def test_nothing_is_left(chat: ChatTokenizer, tmp_path: Path, truncation: str, fix: str) -> None:
    file = write(tmp_path / "d.jsonl", [pair("hello there " * 9, "yes " * 90)])
    with pytest.raises(UserError) as caught:
        build(chat, file, limit=16, truncation=truncation)
    assert str(caught.value).startswith("data: none of 1 records is left (1 too long)")
    assert str(caught.value).endswith(fix)


def test_truncation_is_counted_and_marked(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair("short"), pair("I want euros for my 921 rupees. " * 20, "yes"), pair("q", "no " * 200)]
    found = build(chat, write(tmp_path / "d.jsonl", records), limit=100, truncation="response")
    assert (found.report["truncated"], found.report["removed"]) == (1, {"too long": 1})  # cutting leaves line 2 nothing
    assert lines_of(found, found.training) == [1, 3]
    assert found.truncated.tolist() == [1]
    assert found.report["target_tokens_lost"] > 50
    cut = build(chat, tmp_path / "d.jsonl", limit=100, truncation="prompt")
    assert lines_of(cut, cut.training) == [1, 2]
    assert cut.training.lengths.max() <= 100


def test_long_texts_become_several_samples(chat: ChatTokenizer, tmp_path: Path) -> None:
    texts = [" ".join(f"word{n}.{at}" for at in range(60)) for n in range(3)] + ["short"]
    file = write(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    found = build(chat, file, limit=32, validation_size=1, seed=2)
    learned: dict[int, list[int]] = {}
    for sample in [*found.training, *found.validation]:
        learned.setdefault(sample.record, []).extend(sample.ids[sample.is_target].tolist())
    whole = chat.encode_now([chat.text_sample(text, n) for n, text in enumerate(texts)])
    assert learned == {sample.record: sample.ids[sample.is_target].tolist() for sample in whole}
    assert set(found.training.records).isdisjoint(found.validation.records)
    count = len(found.training) + len(found.validation) - 1
    assert (
        f"data      3 texts longer than model.max_seq_length=32 became {count} samples (data.chunk)"
        in describe_data(found.report)
    )
    assert found.report["target_tokens_lost"] == 0
    dropped = build(chat, file, limit=32, chunk=False)
    assert dropped.report["removed"] == {"too long": 3}


def test_replies_that_are_cut_off_are_a_warning(chat: ChatTokenizer, tmp_path: Path) -> None:
    reply = "This is one. " + "and it goes on and on " * 5
    found = build(chat, write(tmp_path / "d.jsonl", [pair("a", reply), pair("b", reply + ".")]))
    said = f"warning: the last answer stops in mid-sentence: 1 records, first {tmp_path}/d.jsonl:1"
    assert said in describe_data(found.report)


# ---- Sides


def questions(found: PreparedDataset, side: Any) -> list[str]:
    return [c.prompt() for c in found.conversations(side)]


def test_a_share_or_a_number_is_held_out_whatever_the_order(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair(f"question {n}", str(n)) for n in range(200)]
    file = write(tmp_path / "a.jsonl", records)
    shuffled = write(tmp_path / "b.jsonl", random.Random(0).sample(records, 200))
    for changes, count in (({"validation_split": 0.1}, 20), ({"validation_split": 0.1, "validation_size": 33}, 33)):
        found, other = build(chat, file, **changes), build(chat, shuffled, **changes)
        held = set(questions(found, found.validation))
        assert len(held) == count
        assert held == set(questions(other, other.validation))
        assert held.isdisjoint(questions(found, found.training))
        assert len(found.training) == 200 - count
        another = build(chat, file, seed=1, **changes)
        assert set(questions(another, another.validation)) != held


def test_strata_groups_and_time(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [
        pair(
            f"question {n}", user=f"u{n % 25}", source="ab"[n % 4 == 0], date=f"2024-{1 + n // 20:02d}-{1 + n % 20:02d}"
        )
        for n in range(200)
    ]
    file = write(tmp_path / "d.jsonl", records)
    by_question = {record["prompt"]: record for record in records}

    def fields(found: PreparedDataset, side: Any, name: str) -> Counter[str]:
        return Counter(by_question[question][name] for question in questions(found, side))

    found = build(chat, file, validation_split=0.2, split_stratify="source")
    assert fields(found, found.validation, "source") == {"a": 30, "b": 10}
    assert found.report["validation"]["strata"] == {"a": 30, "b": 10}
    assert "share of a" in describe_data(found.report)[-1]
    found = build(chat, file, validation_split=0.2, split_group="user")
    sides = [set(fields(found, side, "user")) for side in (found.training, found.validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 5
    found = build(chat, file, validation_split=0.2, split_time="date")
    dates = [sorted(fields(found, side, "date").elements()) for side in (found.training, found.validation)]
    assert len(dates[1]) == 40
    assert dates[0][-1] < dates[1][0]
    lengths = build(chat, file, validation_split=0.2, split_stratify="length")
    assert len(lengths.report["validation"]["strata"]) >= 1
    with pytest.raises(UserError, match=r"d\.jsonl:1: user: 'u0' is neither a number nor a date"):
        build(chat, file, validation_split=0.2, split_time="user")


def test_a_validation_file_and_what_leaks_into_training(chat: ChatTokenizer, tmp_path: Path) -> None:
    training = write(tmp_path / "a.jsonl", [pair(f"q{n}") for n in range(20)])
    validation = write(tmp_path / "b.jsonl", [pair("q3", "other"), pair("q7"), pair("new"), pair("new")])
    found = build(chat, training, validation_file=validation)
    assert questions(found, found.validation) == ["q3", "q7", "new"]
    assert len(found.training) == 18
    assert rejected(found) == [("duplicate", 4), ("leak", 4), ("leak", 8)]
    assert {c.file for c in found.conversations(found.validation)} == {validation}


def test_a_leak_is_found_whatever_its_case_and_spacing(chat: ChatTokenizer, tmp_path: Path) -> None:
    training = write(tmp_path / "a.jsonl", [pair("What is it?", "this"), pair("Who?", "me")])
    found = build(chat, training, validation_file=write(tmp_path / "b.jsonl", [pair("what  is it? ", "that")]))
    assert (questions(found, found.training), found.report["removed"]) == (["Who?"], {"leak": 1})


def test_one_question_about_many_documents(chat: ChatTokenizer, tmp_path: Path) -> None:
    """The prompt is then the document and the question together."""
    records = [
        {"messages": [{"role": "system", "content": f"Document {n}"}, *talk("Summarize.", f"s{n}")]} for n in range(60)
    ]
    found = build(chat, write(tmp_path / "d.jsonl", records), validation_split=0.1)
    assert (len(found.training), len(found.validation), found.report["removed"]) == (54, 6, {})


def same_opening(n: int, opening: str = "Hi") -> dict[str, Any]:
    return {"messages": talk(opening, "Hello, what can I do?", f"Say {n}", f"It is {n}.")}


def test_conversations_are_compared_by_their_whole_prompt(chat: ChatTokenizer, tmp_path: Path) -> None:
    training = write(tmp_path / "a.jsonl", [same_opening(n) for n in range(40)])
    found = build(chat, training, validation_size=10)
    assert (len(found.training), len(found.validation), found.report["removed"]) == (30, 10, {})
    said = "data      held out 10 of 40 records for validation: equal prompts together"
    assert said in describe_data(found.report)
    others = write(tmp_path / "b.jsonl", [same_opening(3), same_opening(99), {"messages": talk("Hi", "Good day.")}])
    found = build(chat, training, validation_file=others)
    assert (len(found.training), len(found.validation), found.report["removed"]) == (39, 3, {"leak": 1})


def call(city: str) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": {"city": city}}
    return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]


def test_the_prompt_of_the_last_answer_has_the_calls_before_it() -> None:
    cities = ("Rome", "Oslo")
    made = [Conversation([*talk("Hot?"), *call(city), *talk("-", "yes")[1:]], None, "f", 1) for city in cities]
    assert made[0].prompt() != made[1].prompt() != Conversation(talk("Hot?", "yes"), None, "f", 1).prompt() == "Hot?"


HEADLINES = [pair("Write a headline.", f"Headline {n}!") for n in range(40)]


def test_where_all_prompts_are_equal_answers_are_held_out(chat: ChatTokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", HEADLINES)
    found, other = build(chat, file, validation_size=10), build(chat, file, seed=1, validation_size=10)
    assert (len(found.training), len(found.validation), found.report["removed"]) == (30, 10, {})
    assert lines_of(found, found.validation) != lines_of(other, other.validation)
    said = "\n".join(describe_data(found.report))
    assert "held out 10 of 40 records for validation: equal prompts together, except prompts that" in said
    assert "30 training records share the prompt of a validation record: kept, since that prompt is frequent" in said
    assert "near duplicates" not in said


def test_half_of_the_prompts_may_be_equal(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair("Hi", f"Reply {n}.") for n in range(50)] + [pair(f"Say {n}", "So.") for n in range(50)]
    file = write(tmp_path / "a.jsonl", records)
    found = build(chat, file, validation_size=20, near_leaks="remove")
    asked = Counter(question == "Hi" for question in questions(found, found.validation))
    assert min(asked[True], asked[False]) >= 5
    assert (len(found.training), found.report["removed"]) == (80, {})
    held = write(tmp_path / "b.jsonl", [pair("hi", "Good day."), pair("Say 3", "No.")])
    own = build(chat, file, validation_file=held)
    assert (len(own.training), own.report["removed"], own.report["shared_prompts"]) == (99, {"leak": 1}, 50)


@pytest.mark.parametrize(("leaks", "training", "shared"), [("remove", 38, 38), ("warn", 40, 39), ("ignore", 40, 0)])
def test_a_validation_file_with_the_one_prompt_of_all_records(
    chat: ChatTokenizer, tmp_path: Path, leaks: str, training: int, shared: int
) -> None:
    file = write(tmp_path / "a.jsonl", [*HEADLINES[:39], pair("Rare", "old")])
    held = [pair("Write a headline.", "New!"), HEADLINES[7], pair("Rare", "new")]
    found = build(chat, file, validation_file=write(tmp_path / "b.jsonl", held), leaks=leaks)
    assert (len(found.training), len(found.validation)) == (training, 3)
    shared += leaks == "warn"  # the rare prompt
    assert found.report["shared_prompts"] == shared
    said = "\n".join(describe_data(found.report))
    assert ("training records share the prompt of a validation record: kept" in said) == (shared > 0)


def test_names_and_weights_make_records_different(chat: ChatTokenizer, tmp_path: Path) -> None:
    turns = talk("a", "b")
    records = [{"messages": [turns[0], {**turns[1], **more}]} for more in ({}, {"name": "x"}, {"weight": 1})]
    assert len(build(chat, write(tmp_path / "d.jsonl", records)).training) == 3


def test_a_record_counts_once_however_many_samples_it_gives(tmp_path: Path) -> None:
    chat = ChatTokenizer(save(tmp_path / "qwen", STYLES["qwen"]))
    long = "many words " * 30
    thought = "<think>\nh\n</think>\n\nb"  # not shown behind the next question: each answer is a sample
    records = [{"messages": talk(long, thought, "c", "d")}] * 2 + [{"messages": talk("a", thought, "c", long)}]
    file = write(tmp_path / "d.jsonl", records)
    found = build(chat, file, limit=100, deduplicate=False)
    assert (found.report["removed"], found.report["samples_lost"]) == ({"too long": 2}, 5)
    assert lines_of(found, found.training) == [3]
    with pytest.raises(UserError, match=r"^data: none of 3 records is left \(3 too long\)"):
        build(chat, file, limit=16, deduplicate=False)


def test_times_may_be_numbers_in_texts_and_dates_are_utc(chat: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion,t\n" + "".join(f"q{n},a,{1700000000 + n}\n" for n in range(10)))
    found = build(chat, tmp_path / "d.csv", validation_split=0.2, split_time="t")
    assert lines_of(found, found.validation) == [10, 11]
    dates = ["2024-01-01T00:30:00+02:00", "2023-12-31T22:45:00", "2023-12-31T22:00:00"]
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}", t=date) for n, date in enumerate(dates)])
    newest = build(chat, file, validation_size=1, split_time="t")
    assert lines_of(newest, newest.validation) == [2]
    times = [5, 1, 9, 9, 3, 7]
    file = write(tmp_path / "ties.jsonl", [pair(f"q{n}", t=time) for n, time in enumerate(times)])
    newest = build(chat, file, validation_size=3, split_time="t")
    assert lines_of(newest, newest.validation) == [3, 4, 6]
    newest = build(chat, file, validation_size=1, split_time="t")
    assert lines_of(newest, newest.validation) in ([3], [4])


def test_a_size_that_leaves_nothing(chat: ChatTokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(5)])
    with pytest.raises(UserError, match=r"data\.validation_size: 5 of only 5 records"):
        build(chat, file, validation_size=5)


WORDS = [f"w{n}" for n in range(500)]


def long_texts(count: int) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=80)) for _ in range(count)]


def test_near_duplicates_and_near_leaks(chat: ChatTokenizer, tmp_path: Path) -> None:
    texts = long_texts(30)
    records = [pair(text, "yes") for text in texts]
    records += [pair(texts[n] + " more", "yes") for n in range(5)]  # near duplicates of the first five
    held = [pair("very " + texts[9], "no")]
    file, validation = write(tmp_path / "a.jsonl", records), write(tmp_path / "b.jsonl", held)
    expected: dict[tuple[Any, str], dict[str, int]] = {
        (None, "ignore"): {},
        (None, "warn"): {},
        (None, "remove"): {"leak": 1},
        (0.8, "warn"): {"near duplicate": 5},
        (0.8, "remove"): {"near duplicate": 5, "leak": 1},
    }
    for (duplicates, leaks), removed in expected.items():
        changes = {"near_duplicates": duplicates, "near_leaks": leaks}
        found = build(chat, file, limit=2048, validation_file=validation, **changes)
        assert found.report["removed"] == removed
        assert len(found.training) == 35 - sum(removed.values())
        assert found.report["near_leaks"] == (leaks == "warn")
        warned = any("1 training prompts are near duplicates" in line for line in describe_data(found.report))
        assert warned is (leaks == "warn")
        assert not list(found.directory.glob("*.sig"))
    assert {line for _, line in rejected(found)} == {10, 31, 32, 33, 34, 35}


def test_a_system_text_that_all_records_share_makes_none_of_them_alike(chat: ChatTokenizer, tmp_path: Path) -> None:
    system, *asked = long_texts(41)
    records = [{"messages": [{"role": "system", "content": system}, *talk(text[:60], "yes")]} for text in asked]
    file = write(tmp_path / "d.jsonl", records)
    found = build(chat, file, limit=2048, validation_split=0.2, near_duplicates=0.5, near_leaks="remove")
    assert (len(found.training), len(found.validation), found.report["removed"]) == (32, 8, {})


@pytest.mark.parametrize(
    ("weights", "counts"), [((2.0, 1.0), (20, 40)), ((0.5, 1.0), (5, 40)), ((1.5, 0.25), (15, 10))]
)
def test_weights_say_how_often_a_file_is_seen(
    chat: ChatTokenizer, tmp_path: Path, weights: tuple[float, ...], counts: tuple[int, int]
) -> None:
    first = write(tmp_path / "a.jsonl", [pair(f"a{n}") for n in range(10)])
    second = write(tmp_path / "b.jsonl", [pair(f"b{n}") for n in range(40)])
    found = build(chat, f"{first},{second}", weights=weights)
    files = Counter(found.location(record).rpartition(":")[0] for record in found.training.records.tolist())
    assert (files[first], files[second]) == counts
    seen = Counter(found.training.records.tolist())
    assert max(seen[r] for r in seen if r < 10) - min(seen.get(r, 0) for r in range(10)) <= 1
    with pytest.raises(UserError, match=r"data\.weights: 2 weights for 1 files"):
        build(chat, first, weights=weights)


def test_nothing_is_left_for_training(chat: ChatTokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair("q")])
    other = write(tmp_path / "b.jsonl", [pair("q", "x")])
    with pytest.raises(UserError, match="no record is left for training"):
        build(chat, file, validation_file=other)


# ---- The cache


def same(a: PreparedDataset, b: PreparedDataset) -> bool:
    sides = ("training", "validation")
    return a.report == b.report and all(
        [s.ids.tolist() for s in getattr(a, side)] == [s.ids.tolist() for s in getattr(b, side)] for side in sides
    )


def test_the_second_time_nothing_is_read(chat: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(30)])
    first = build(chat, file, validation_split=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "read_file", lambda *_: pytest.fail("read again"))
        assert same(build(chat, file, validation_split=0.2), first)
        assert build(chat, file, validation_split=0.2, packing=True).directory == first.directory


def test_another_stop_token_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """Which token ends an answer depends on generation_config.json, where the preflight check `stop` says to add it."""
    file, model = write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(9)]), tmp_path / "model"
    model.mkdir()
    save(model, Style(NEXT_ROLE, None, "<|endoftext|>", ""))
    before = build(ChatTokenizer(model), file)
    stop = ChatTokenizer(model).tokenizer.token_to_id("<s>")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    after = build(ChatTokenizer(model), file)
    last = [sample.ids[sample.is_target][-1] for sample in (before.training[0], after.training[0])]
    assert last[0] != last[1] == stop


# ---- Code: nanoft's own, and the user's


SCRIPT = """
import sys
from pathlib import Path
from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets, data_hash
data = DataConfig(train_file=sys.argv[1], validation_split=0.0, format=sys.argv[3])
prepared = build_datasets(data, ChatTokenizer(Path(sys.argv[2])), 512, 0, print)
print("from the cache" if prepared.from_cache else "built")
print("targets", prepared.report["training"]["target_tokens"])
print("hash", data_hash(data))
"""


def run_script(directory: Path, file: str, data_format: str = "auto") -> str:
    """Output of SCRIPT with the package and the user's functions of a directory."""
    command = [sys.executable, "-c", SCRIPT, file, str(TINY), data_format]
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr[-500:]


def test_data_files_are_looked_up_once(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset on the Hub costs a request per look-up."""
    asked: list[str] = []
    real = dataset.find_files
    monkeypatch.setattr(dataset, "find_files", lambda spec, *name: asked.append(spec) or real(spec, *name))
    file = write(tmp_path / "d.jsonl", [{"prompt": f"q{n}", "completion": "yes"} for n in range(10)])
    build(chat, file)
    assert asked == [file]


def test_edited_data_code_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """Edits a copy of the package, as a user who changes nanoft would."""
    file = write(tmp_path / "d.jsonl", [{"document": f"text {n}", "summary": "short"} for n in range(10)])
    shutil.copytree(ROOT / "nanoft", tmp_path / "copy" / "nanoft", ignore=shutil.ignore_patterns("__pycache__"))
    formats = tmp_path / "copy" / "nanoft" / "data" / "formats.py"
    first, again = (run_script(tmp_path / "copy", file) for _ in range(2))
    assert "from the cache" not in first
    assert "from the cache" in again
    assert first.splitlines()[-2:] == again.splitlines()[-2:]
    source = formats.read_text()
    assert source.count('text_of(record, "summary")') == 1
    formats.write_text(source.replace('text_of(record, "summary")', 'text_of(record, "summary") + " and more"'))
    edited, cached = (run_script(tmp_path / "copy", file) for _ in range(2))
    assert "from the cache" not in edited
    assert "from the cache" in cached
    targets = [int(re.findall(r"targets (\d+)", text)[0]) for text in (first, edited, cached)]
    assert targets[0] < targets[1] == targets[2]


def test_an_edited_format_function_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [{"q": f"q{n}", "a": "yes"} for n in range(10)])
    (tmp_path / "user").mkdir()
    module = tmp_path / "user" / "my_format.py"
    module.write_text('def convert(record):\n    return {"prompt": record["q"], "completion": record["a"]}\n')
    os.symlink(ROOT / "nanoft", tmp_path / "user" / "nanoft")
    first, again = (run_script(tmp_path / "user", file, "my_format:convert") for _ in range(2))
    assert "from the cache" not in first
    assert "from the cache" in again
    module.write_text(module.read_text().replace('record["a"]', 'record["a"] * 2'))
    edited = run_script(tmp_path / "user", file, "my_format:convert")
    assert "from the cache" not in edited
    hashes = [re.findall(r"hash (\w+)", text)[0] for text in (first, again, edited)]
    assert hashes[0] == hashes[1] != hashes[2]  # so that a run is not resumed with another function


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "length": {"limit": 500},
    "split": {"validation_split": 0.3},
    "train_on": {"train_on": "all"},
    "truncation": {"truncation": "prompt"},
    "deduplicate": {"deduplicate": False},
    "format": {"format": "prompt_completion"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_it_depends_on_makes_another_entry(chat: ChatTokenizer, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(10)])
    entries = {build(chat, file, **{"validation_split": 0.2, **changes}).directory for changes in ({}, CHANGES[name])}
    assert len(entries) == 2


def test_other_data_template_tokenizer_or_date_make_another_entry(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(10)])
    plain = ChatTokenizer(save(tmp_path / "a", STYLES["chatml"]))
    thinking = ChatTokenizer(save(tmp_path / "b", STYLES["qwen"]))
    without = ChatTokenizer(tmp_path / "b", {"enable_thinking": False})
    dated, later = (ChatTokenizer(save(tmp_path / "c", STYLES["llama"])) for _ in range(2))
    later.date = later.date.replace(year=2020)
    undated = ChatTokenizer(tmp_path / "a")
    undated.date = later.date
    entries = [build(chat, file).directory for chat in (plain, thinking, without, dated, later, undated)]
    assert len(set(entries)) == 5
    assert entries[0] == entries[5]  # a template without a date does not care
    write(tmp_path / "d.jsonl", [pair(f"q{n}") for n in range(11)])
    assert build(plain, file).directory not in entries


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "training.npy", "report.json", REJECTED])
def test_a_damaged_entry_is_built_again(chat: ChatTokenizer, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "d.jsonl", ["{", *(pair(f"q{n}") for n in range(30))])
    first = build(chat, file, validation_split=0.2)
    content = (first.directory / name).read_bytes()
    path = first.directory / name
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = build(chat, file, validation_split=0.2)
    assert (second.directory / name).read_bytes() == content
    assert len(second.training) == 24


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_records_end_in_counts_that_add_up(chat: ChatTokenizer, tmp_path: Path, data: st.DataObject) -> None:
    """Kept plus skipped records are all records read; no sample is too long or without a target; packing loses none."""
    word = st.text(st.sampled_from("abc é\n<s>[INST]\x07"), max_size=30)
    record = st.builds(pair, word, word) | st.just("{") | st.builds(pair, st.integers(), word)
    records = data.draw(st.lists(record, min_size=1, max_size=25))
    file = write(tmp_path / f"{data.draw(st.integers(0, 10**9))}.jsonl", records)
    policy = data.draw(st.sampled_from(["drop", "prompt", "response", "proportional"]))
    share = data.draw(st.sampled_from([0.0, 0.3]))
    try:
        found = build(chat, file, 24, max_bad_records=1.0, truncation=policy, validation_split=share)
    except UserError as error:
        if not re.search(r"none of \d+ records is left|no record is left|unknown shape|not valid JSON", str(error)):
            raise
        return
    sides = [found.training, found.validation]
    kept = sum(len(side) for side in sides)
    assert kept + sum(found.report["removed"].values()) == found.report["read"] == len(records)
    samples: list[Sample] = [sample for side in sides for sample in side]
    assert all(sample.is_target.any() and len(sample.ids) <= 24 and not sample.is_target[0] for sample in samples)
    run = Batches(found.training, 2, 2, 0, chat.pad_id, pack_length=24)
    packed = [batch for index in range(run.windows_in_epoch()) for batch in run.window(index)]
    assert sum(batch.target_tokens for batch in packed) == found.report["training"]["target_tokens"]
    assert sum(batch.tokens for batch in packed) == found.report["training"]["tokens"]
    assert sorted(r for batch in packed for r in batch.records) == sorted(found.training.records.tolist())
    assert np.array_equal(found.training.lengths, [len(s.ids) for s in found.training])


def test_settings_that_are_not_in_the_key_do_not_change_samples() -> None:
    names = {item.name for item in dataclasses.fields(DataConfig)}
    assert set(dataset.NOT_IN_KEY) <= names


# ---- What an evaluation asks of it


def test_fields_are_those_of_the_records(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = [pair(f"q{n}", f"a{n}", topic=n % 3) if n % 5 else pair(f"q{n}") for n in range(20)]
    system = [{"role": "system", "content": "be kind"}]
    first = write(tmp_path / "a.jsonl", records)
    second = write(tmp_path / "b.jsonl", [{"messages": system + talk("x", "y", "z", "w"), "topic": "m"}])
    found = build(chat, f"{first},{second}", validation_split=0.3)
    for side in (found.training, found.validation):
        expected = []
        for record in side.records.tolist():
            file, _, line = found.location(record).rpartition(":")
            raw = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
            expected.append(str(raw.get("topic", "(none)")))
        assert found.field_values(side, "topic") == expected
    with pytest.raises(UserError, match="tpic: no record has this field: choose from prompt, completion"):
        found.field_values(found.training, "tpic")
