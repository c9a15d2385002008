"""Records that compare or judge answers: every shape, what is counted and skipped, and the tokens of both answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import csv, parquet
from templates import STYLES, TINY, save
from transformers import AutoTokenizer

from nanoft import UserError
from nanoft.batches import Batches, TokenDataset
from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets, data_hash, describe_data
from nanoft.data.formats import Conversation, Learns, Rejected, read_file
from nanoft.data.inspection import check_data, preview, show_window

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]}


def talk(*turns: str, start: str = "user") -> list[dict[str, str]]:
    """Turns of user and assistant in alternation; a system message first if it begins with a star."""
    system = [{"role": "system", "content": turns[0][1:]}] if turns[0].startswith("*") else []
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    return system + [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns[len(system) :])]


def gpt(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]


def read(path: Path, records: list[Any], learns: Learns = "pairs", **reading: Any) -> list[Conversation | Rejected]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    _, *items = read_file(path, DataConfig(**reading), learns=learns)
    assert len(items) == len(records)
    return items  # type: ignore[return-value]


def said(messages: list[dict[str, Any]]) -> str:
    """`s:Be kind u:Q (a:context) a:answer`; an answer in brackets is no target."""
    turns = [f"{m['role'][0]}:{m['content'] or m['tool_calls'][0]['function']['name']}" for m in messages]
    return " ".join(f"({t})" if m.get("weight") == 0 else t for t, m in zip(turns, messages, strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(TINY)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- Shapes

HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Q\n\nAssistant:"
FEEDBACK = {"score_chosen": 8.0, "messages": talk("Q", "good")}
PAIRS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "texts": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, ["u:Q a:good", "u:Q a:bad"]),
    "numbers": ({"prompt": "2 + 2", "chosen": 4, "rejected": 5}, ["u:2 + 2 a:4", "u:2 + 2 a:5"]),
    "system": ({"system": "S", "prompt": "Q", "chosen": "g", "rejected": "b"}, ["s:S u:Q a:g", "s:S u:Q a:b"]),
    "messages": (
        {"prompt": talk("*S", "H", "Y", "Q"), "chosen": talk("g", start="a"), "rejected": talk("b", start="a")},
        ["s:S u:H (a:Y) u:Q a:g", "s:S u:H (a:Y) u:Q a:b"],
    ),
    "a message": ({"prompt": talk("Q"), "chosen": talk("g", start="a")[0], "rejected": "b"}, ["u:Q a:g", "u:Q a:b"]),
    "calls": ({"prompt": "Q", "chosen": [CALL], "rejected": "bad", "tools": TOOLS}, ["u:Q a:add", "u:Q a:bad"]),
    "implicit": (
        {"chosen": talk("H", "Y", "Q", "g"), "rejected": talk("H", "Y", "Q", "b")},
        ["u:H (a:Y) u:Q a:g", "u:H (a:Y) u:Q a:b"],
    ),
    "different from the first answer on": (
        {"chosen": talk("H", "Y", "Q", "g"), "rejected": talk("H", "Z", "Q", "b")},
        ["u:H a:Y u:Q a:g", "u:H a:Z u:Q a:b"],
    ),
    "one begins with the other": (
        {"chosen": talk("H", "Y"), "rejected": talk("H", "Y", "Q", "b")}, ["u:H a:Y", "u:H a:Y u:Q a:b"]
    ),
    "ultrafeedback_binarized": (
        {"prompt": "Q", "chosen": talk("Q", "good"), "rejected": talk("Q", "bad"), **FEEDBACK},
        ["u:Q a:good", "u:Q a:bad"],
    ),
    "the first question as prompt": (
        {"prompt": "H", "chosen": talk("H", "Y", "Q", "g"), "rejected": talk("H", "Y", "Q", "b")},
        ["u:H (a:Y) u:Q a:g", "u:H (a:Y) u:Q a:b"],
    ),
    "sharegpt": (
        {"conversations": gpt("H", "Y", "Q"), "chosen": gpt("", "g")[1], "rejected": gpt("", "b")[1], "system": "S"},
        ["s:S u:H (a:Y) u:Q a:g", "s:S u:H (a:Y) u:Q a:b"],
    ),
    "axolotl": (
        {"messages": talk("Q"), "chosen": talk("g", start="a")[0], "rejected": talk("b", start="a")[0]},
        ["u:Q a:g", "u:Q a:b"],
    ),
    "openai": (
        {"input": {"messages": talk("Q"), "tools": TOOLS}, "preferred_output": talk("g", start="a"),
         "non_preferred_output": talk("b", start="a")},
        ["u:Q a:g", "u:Q a:b"],
    ),
    "hh-rlhf": ({"chosen": HH + " g", "rejected": HH + " b"}, ["u:Hi (a:Yo) u:Q a:g", "u:Hi (a:Yo) u:Q a:b"]),
    "hh-rlhf prompt": ({"prompt": HH, "chosen": "g", "rejected": "b"}, ["u:Hi (a:Yo) u:Q a:g", "u:Hi (a:Yo) u:Q a:b"]),
    "orca_dpo_pairs": (
        {"system": "S", "question": "Q", "chosen": "g", "rejected": "b"}, ["s:S u:Q a:g", "s:S u:Q a:b"]
    ),
    "distilabel-intel-orca-dpo-pairs": (
        {"system": "S", "input": "Q", "chosen": "g", "rejected": "b", "generations": ["g", "b"], "rating": [9, 7]},
        ["s:S u:Q a:g", "s:S u:Q a:b"],
    ),
    "alpaca": (
        {"instruction": "I", "input": "Q", "chosen": "g", "rejected": "b"}, ["u:I\n\nQ a:g", "u:I\n\nQ a:b"]
    ),
    "alpaca without instruction": (
        {"instruction": "", "input": "Q", "chosen": "g", "rejected": "b"}, ["u:Q a:g", "u:Q a:b"]
    ),
    "other names": ({"input": "Q", "chosen_response": "g", "rejected_response": "b"}, ["u:Q a:g", "u:Q a:b"]),
    "stack-exchange-paired": ({"question": "Q", "response_j": "g", "response_k": "b"}, ["u:Q a:g", "u:Q a:b"]),
    "JSON in texts": (
        {key: json.dumps(talk(*turns)) for key, turns in (("chosen", ("Q", "g")), ("rejected", ("Q", "b")))},
        ["u:Q a:g", "u:Q a:b"],
    ),
    "ranked texts": ({"prompt": "Q", "answers": ["g", "b", "c"]}, ["u:Q a:g", "u:Q a:b", "u:Q a:c"]),
    "ranked with an empty one": ({"prompt": "Q", "answers": ["g", "", "g", "c"]}, ["u:Q a:g", "u:Q a:c"]),
    "nectar": (
        {"prompt": HH, "answers": [{"answer": "b", "rank": 2.0, "model": "m"}, {"answer": "g", "rank": 1.0}]},
        ["u:Hi (a:Yo) u:Q a:g", "u:Hi (a:Yo) u:Q a:b"],
    ),
    "ultrafeedback": (
        {"instruction": "Q", "completions": [{"response": r, "overall_score": s} for r, s in (("b", 1), ("g", 9))]},
        ["u:Q a:g", "u:Q a:b"],
    ),
    "ties": (
        {"prompt": "Q", "answers": [{"text": t, "score": s} for t, s in (("b", 1), ("g", 2), ("h", 2), ("c", 0))]},
        ["u:Q a:g", "u:Q a:b", "u:Q a:c"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("learns", ["pairs", "labels"])
def test_every_shape_of_pairs(path: Path, name: str, learns: Learns) -> None:
    record, expected = PAIRS[name]
    (found,) = read(path, [record], learns)
    assert isinstance(found, Conversation), found
    assert [said(messages) for messages in found.versions] == expected
    context = expected[0][: expected[0].index(" a:")]
    assert found.answer_at == len(re.findall(r"(?:^| )\(?[sua]:", context))
    assert bool(found.tools) == (name in ("calls", "openai"))


UNPAIRED: dict[str, tuple[dict[str, Any], str, float]] = {
    "prompt and completion": ({"prompt": "Q", "completion": "A", "label": True}, "u:Q a:A", 1),
    "kto-mix-14k": ({"prompt": talk("Q"), "completion": talk("A", start="a"), "label": False}, "u:Q a:A", 0),
    "messages": ({"messages": talk("*S", "H", "Y", "Q", "A"), "label": "bad"}, "s:S u:H (a:Y) u:Q a:A", 0),
    "sharegpt": ({"conversations": gpt("Q", "A"), "kto_tag": True}, "u:Q a:A", 1),
    "alpaca": ({"instruction": "I", "input": "", "output": "A", "label": 0}, "u:I a:A", 0),
    "with a call": (
        {"messages": [*talk("Q"), CALL, {"role": "tool", "content": "4"}, *talk("A", start="a")], "label": 1},
        "u:Q a:add t:4 a:A",
        1,
    ),
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_every_shape_of_single_answers(path: Path, name: str) -> None:
    record, expected, label = UNPAIRED[name]
    (found,) = read(path, [record], "labels")
    assert isinstance(found, Conversation), found
    assert (said(found.messages), found.label, found.worse) == (expected, label, ())
    assert found.prompt() == "\n".join(m["content"] for m in found.messages[: found.answer_at])


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_files_of_other_kinds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    records = [{"prompt": f"Q{n}", "chosen": talk(f"Q{n}", "g"), "rejected": talk(f"Q{n}", "b")} for n in range(3)]
    texts = [{name: value if name == "prompt" else json.dumps(value) for name, value in r.items()} for r in records]
    if suffix == "json":
        path.write_text(json.dumps(records, indent=1))
    elif suffix == "csv":
        csv.write_csv(pyarrow.Table.from_pylist(texts), path)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    _, *found = read_file(path, DataConfig(), learns="pairs")
    assert [[said(m) for m in c.versions] for c in found] == [[f"u:Q{n} a:g", f"u:Q{n} a:b"] for n in range(3)]  # type: ignore[union-attr]


def test_columns_margins_and_a_function_of_the_user(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"q": "Q", "good": "g", "poor": "b", "gap": 1.5, "ok": "yes"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "poor"}
    (found,) = read(path, [record], columns=columns, margin_field="gap")
    assert isinstance(found, Conversation)
    assert ([said(m) for m in found.versions], found.label) == (["u:Q a:g", "u:Q a:b"], 1.5)
    (tmp_path / "preference_formats.py").write_text(
        "def pair(r): return {'prompt': r['q'], 'chosen': r['good'], 'rejected': r['poor']}\n"
        "def single(r): return {'prompt': r['q'], 'completion': r['good']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (pair,) = read(path, [record], format="preference_formats:pair", margin_field="gap")
    (single,) = read(path, [record], "labels", format="preference_formats:single", label_field="ok")
    assert isinstance(pair, Conversation)
    assert isinstance(single, Conversation)
    assert (pair.versions, pair.label) == (found.versions, 1.5)
    assert (said(single.messages), single.label) == ("u:Q a:g", 1.0)
    (bad,) = read(path, [record], format="preference_formats:single")
    assert "the function returned the fields prompt, completion: return the fields of a shape" in bad.reason  # type: ignore[union-attr]


# ---- What is no pair


def ranked(*answers: Any) -> dict[str, Any]:
    return {"prompt": "Q", "answers": [*answers]}


def compared(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": "Q", "chosen": chosen, "rejected": rejected}


SKIPPED: list[tuple[Learns, dict[str, Any], str]] = [
    ("pairs", compared("same", "same"), "equal answers"),
    ("pairs", {"chosen": talk("Q", "A"), "rejected": talk("Q", "A")}, "equal answers"),
    *(("pairs", compared("good", nothing), "empty answer") for nothing in ("", " \n", None, [])),
    ("pairs", {"chosen": HH + " good", "rejected": HH}, "empty answer"),
    ("pairs", ranked("only one"), "no worse answer"),
    ("pairs", ranked("same", "same"), "no worse answer"),
    ("pairs", ranked({"text": "a", "score": 1}, {"text": "b", "score": 1}), "no worse answer"),
    ("labels", {"prompt": "Q", "completion": "", "label": True}, "empty answer"),
    ("labels", {"messages": talk("Q", " "), "label": True}, "empty answer"),
    *(("labels", {"prompt": "Q", "completion": "A", "label": none}, "no label") for none in (None, "", "NaN")),
    ("labels", {"prompt": "Q", "completion": "A"}, "no label"),
]


@pytest.mark.parametrize(("learns", "record", "kind"), SKIPPED)
def test_what_has_no_preference_is_counted_as_such(
    learns: Learns, record: dict[str, Any], kind: str, path: Path, chat: ChatTokenizer
) -> None:
    usable = {name: f"some {name}" for name in record} | {"label": True}
    whole = () if "prompt" in record else ("chosen", "rejected", "messages")
    usable |= {name: talk("Q", f"{name} answer") for name in whole if name in record}
    usable |= {"answers": ["a", "b"]} if "answers" in record else {}
    corpus = build(path, chat, [usable, *(record | {"id": n} for n in range(9))], learns)
    assert corpus.report["removed"] == {kind: 9}
    assert len(corpus.training) == corpus.training.unit_size


MALFORMED = [
    (compared("g", [["x"]]), 'rejected: a turn needs a role and content, found ["x"]'),
    (compared("g", True), "rejected: true is not a string"),
    (compared("g", "\ud800"), "rejected: contains a lone surrogate"),
    (compared("g", [{"role": "user", "content": "b"}]), "have no prompt in common"),
    (compared("g", "[{'role': 'assistant', 'content': 'b'}]"), "rejected: not valid JSON"),
    ({"chosen": "g", "rejected": "b"}, "has no prompt"),
    ({"prompt": "Q", "chosen": "g"}, "expected the fields chosen, rejected, found prompt, chosen"),
    ({"chosen": talk("Q", "A"), "rejected": talk("R", "B")}, "have no prompt in common"),
    ({"prompt": "X", "chosen": talk("Q", "A"), "rejected": talk("Q", "B")}, "differs from the prompt in the answers"),
    (compared("g", "b") | {"prompt": " "}, "a user message is empty"),
]


@pytest.mark.parametrize(("record", "reason"), MALFORMED)
def test_malformed_pairs(path: Path, record: dict[str, Any], reason: str) -> None:
    good, bad = read(path, [compared("g", "b"), record])
    assert isinstance(good, Conversation)
    assert isinstance(bad, Rejected)
    assert (bad.kind, bad.line) == ("malformed", 2)
    assert reason in bad.reason
    assert "\n" not in bad.reason


@pytest.mark.parametrize(
    "answers", [5, "text", {"a": 1}, [1, 2], [None], [{"text": "a"}], [{"text": "a", "rank": "x"}]]
)
def test_malformed_rankings(path: Path, answers: Any) -> None:
    _, bad = read(path, [ranked("a", "b"), {"prompt": "Q", "answers": answers}])
    assert isinstance(bad, Rejected)
    assert (bad.kind, bad.line, bad.reason[:6] in ("answer", "rank: ")) == ("malformed", 2, True)


def test_pairs_are_compared_by_their_prompt_without_the_system_message(path: Path) -> None:
    (found,) = read(path, [{"system": "S", "prompt": "Q", "chosen": "good", "rejected": "bad"}])
    assert isinstance(found, Conversation)
    assert (found.prompt(), found.prompt(system=False)) == ("S\nQ", "Q")
    assert found.full_text(system=False) == "Q\ngood\nQ\nbad"


@pytest.mark.parametrize("gap", [None, "x", float("nan"), [1]])
def test_a_margin_is_a_number(path: Path, gap: Any) -> None:
    _, bad = read(path, [compared("g", "b") | {"gap": 1}, compared("g", "b") | {"gap": gap}], margin_field="gap")
    assert isinstance(bad, Rejected)
    assert re.fullmatch("gap: .* is not a number", bad.reason)


ELSEWHERE: list[tuple[Learns, dict[str, Any], str]] = [
    ("pairs", {"messages": talk("Q", "A")}, r"it has no preferred answers \(messages\): set training\.objective=sft$"),
    ("pairs", {"text": "A"}, r"it has no preferred answers \(text\): set training\.objective=sft$"),
    ("pairs", {"prompt": "Q", "completion": "A", "label": True}, r"objective=sft, or training\.objective=kto to "),
    ("labels", {"text": "A"}, r"set training\.objective=sft$"),
    ("turns", ranked("a", "b"), r"contains pairs of answers: set training\.objective=dpo to learn the preference"),
    ("turns", PAIRS["sharegpt"][0], r"contains pairs of answers: set training\.objective=dpo to learn the preference"),
    ("turns", PAIRS["axolotl"][0], r"contains pairs of answers: set training\.objective=dpo to learn the preference"),
]  # fmt: skip


@pytest.mark.parametrize(("learns", "record", "message"), ELSEWHERE)
def test_data_of_another_objective_is_named(path: Path, learns: Learns, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(path, [record], learns)


@pytest.mark.parametrize(
    ("learns", "shape", "record"),
    [
        ("pairs", "preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("pairs", "ranked", ranked("a", "b")),
        ("labels", "preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("prompts", "prompt", {"prompt": "Q"}),
    ],
)
def test_a_shape_that_the_user_names(path: Path, learns: Learns, shape: str, record: dict[str, Any]) -> None:
    (found,) = read(path, [record], learns, format=shape)
    assert isinstance(found, Conversation), found
    assert found == read(path, [record], learns)[0]
    assert data_hash(DataConfig(train_file=str(path), format=shape)) == data_hash(DataConfig(train_file=str(path)))
    with pytest.raises(UserError, match=rf"^data\.format: '{shape}' is not known"):
        read(path, [record], "turns", format=shape)


def test_answers_without_any_label(path: Path, chat: ChatTokenizer) -> None:
    with pytest.raises(UserError, match=r"none of 2 records is left \(2 no label\): .*data\.label_field"):
        build(path, chat, [{"prompt": f"Q{n}", "completion": "A"} for n in range(2)], "labels")


# ---- Tokens


def build(
    path: Path, chat: ChatTokenizer, records: list[Any], learns: Learns = "pairs", **more: Any
) -> PreparedDataset:
    limit = more.pop("limit", 512)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = DataConfig(**{"train_file": str(path), "validation_split": 0.0, **more})
    return build_datasets(data, chat, limit, 0, print, learns=learns)


@pytest.mark.parametrize("style", ["chatml", "marked", "mistral", "llama", "qwen", "zephyr"])
def test_both_answers_are_tokenized_as_transformers_renders_them(style: str, path: Path, tmp_path: Path) -> None:
    """The inference prompt is the prefix, and the answer ends in the end of its turn, once."""
    directory = save(tmp_path / "model", STYLES[style])
    chat, reference = ChatTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    prompt = talk("*Be kind", "Hello", "Yes?", "And now?") if style != "qwen" else talk("And now?")
    corpus = build(path, chat, [{"prompt": prompt, "chosen": "Good answer", "rejected": "A bad, longer answer"}])
    asked = reference.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    has_bos = style == "zephyr"  # which the tokenizer adds, not the template
    before = reference(asked, add_special_tokens=has_bos)["input_ids"]
    assert len(corpus.training) == 2
    for sample, answer in zip(corpus.training, ("Good answer", "A bad, longer answer"), strict=True):
        whole = [*prompt, {"role": "assistant", "content": answer}]
        text = reference.apply_chat_template(whole, tokenize=False)
        start = int(sample.is_target.argmax())
        assert sample.ids[:start].tolist() == before
        ids, end = sample.ids.tolist(), int(np.flatnonzero(sample.is_target)[-1]) + 1
        if style != "qwen":  # whose template puts an empty thought before the answer, which no prompt has
            assert ids[:end] == reference(text, add_special_tokens=has_bos)["input_ids"][:end]
        assert sample.is_target[start:end].all()
        assert ids[end - 1] in chat.stop_ids
        assert sum(token in chat.stop_ids for token in ids[start:]) == 1
        assert chat.decode(ids[start : end - 1]).strip() == answer


def test_thoughts_of_both_answers_are_learned(path: Path, tmp_path: Path) -> None:
    chat = ChatTokenizer(save(tmp_path / "model", STYLES["qwen"]))
    thought = [{"role": "assistant", "content": f"<think>\nthought {n}\n</think>\n\nA"} for n in range(2)]
    corpus = build(path, chat, [{"prompt": "Q", "chosen": [thought[0]], "rejected": [thought[1]]}])
    for n, sample in enumerate(corpus.training):
        assert f"thought {n}" in chat.decode(sample.ids[sample.is_target].tolist())


SENTENCE = "I would like to hear about the sea. "
OLD = [f"old {n} " + SENTENCE for n in range(4)]


def test_pairs_are_truncated_with_one_prompt(path: Path, chat: ChatTokenizer) -> None:
    """System text and the last user turn stay, older turns go, and both answers keep the same prompt."""
    record = {"prompt": talk("*Be kind.", *OLD, "The question?"), "chosen": "Good.", "rejected": SENTENCE * 2}
    whole = build(path, chat, [record]).training
    shortest = build(path, chat, [record | {"prompt": talk("*Be kind.", "The question?")}]).training.lengths.max()
    for limit in range(shortest, whole.lengths.max(), 8):
        corpus = build(path, chat, [record], limit=limit, truncation="prompt")
        chosen, rejected = corpus.training
        prompts = [sample.ids[: int(sample.is_target.argmax())].tolist() for sample in (chosen, rejected)]
        assert prompts[0] == prompts[1]
        assert len(prompts[0]) < int(whole[0].is_target.argmax())
        assert max(corpus.training.lengths) <= limit
        text = chat.decode(prompts[0], keep_special=True)
        assert "Be kind." in text
        assert "The question?" in text
        for cut, sample in zip((chosen, rejected), whole, strict=True):
            assert cut.ids[cut.is_target].tolist() == sample.ids[sample.is_target].tolist()
        assert (corpus.report["truncated"], corpus.report["answers_cut"]) == (2, 0)


@pytest.mark.parametrize("policy", ["response", "proportional"])
def test_a_cut_inside_an_answer_is_counted(path: Path, chat: ChatTokenizer, policy: str) -> None:
    record = {"prompt": "The question?", "chosen": "Good.", "rejected": SENTENCE * 4}
    whole = build(path, chat, [record]).training
    limit = int(whole.lengths.max()) - 6
    corpus = build(path, chat, [record], limit=limit, truncation=policy)
    chosen, rejected = corpus.training
    assert chosen.ids.tolist() == whole[0].ids.tolist()
    assert rejected.ids.tolist() == whole[1].ids[: len(rejected.ids)].tolist()
    assert corpus.report["answers_cut"] == 1
    assert any(
        re.match(rf"\| truncated \({policy}\) +\| 1, 1 inside an answer ", row)
        for row in "\n".join(describe_data(corpus.report)).split("\n")
    )
    stop = next(check for check in check_data(corpus, chat, "assistant") if check.name == "stop")
    assert stop.passed


def test_a_pair_is_dropped_as_a_whole(path: Path, chat: ChatTokenizer) -> None:
    long, short = (
        {"prompt": "Q", "chosen": "a", "rejected": SENTENCE * 9},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    )
    corpus = build(path, chat, [long, short], limit=60)
    assert (len(corpus.training), corpus.report["removed"]) == (2, {"too long": 1})
    with pytest.raises(UserError, match=r"data\.jsonl:1: .* tokens, more than model\.max_seq_length=60"):
        build(path, chat, [long, short], limit=60, truncation="reject")


# ---- Splits, weights, cache


def many(count: int, answers: int = 2) -> Iterator[dict[str, Any]]:
    for n in range(count):
        yield {"prompt": f"Question {n}", "answers": [f"answer {m} to {n}" for m in range(answers)]}


def is_whole(samples: TokenDataset) -> bool:
    return samples.unit_size == 2 and (samples.records[::2] == samples.records[1::2]).all()


def test_a_record_lies_on_one_side_of_the_split(path: Path, chat: ChatTokenizer) -> None:
    records = [*many(30, 4), *({"prompt": f"Question {n}", "answers": ["yes", "no"]} for n in range(30))]
    corpus = build(path, chat, records, validation_split=0.2)
    assert is_whole(corpus.training)
    assert is_whole(corpus.validation)
    prompts = [{c.prompt() for c in corpus.conversations(samples)} for samples in (corpus.training, corpus.validation)]
    assert not prompts[0] & prompts[1]
    assert len(corpus.training) + len(corpus.validation) == 2 * (30 * 3 + 30)
    assert (len(corpus.validation), len(prompts[1])) == (2 * 6 * 4, 6)


def test_leaks_and_duplicates(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "question 3", "chosen": "other", "rejected": "answers"}) + "\n")
    corpus = build(path, chat, [*many(9), *many(2)], validation_file=str(held))
    assert corpus.report["removed"] == {"duplicate": 2, "leak": 1}
    assert (len(corpus.training), len(corpus.validation)) == (2 * 8, 2)


@pytest.mark.parametrize("weight", [0.3, 2.5])
def test_weights_copy_whole_pairs(path: Path, chat: ChatTokenizer, weight: float) -> None:
    corpus = build(path, chat, [*many(20)], weights=(weight,))
    assert is_whole(corpus.training)
    assert len(corpus.training) == 2 * round(20 * weight)
    assert set(Counter(corpus.training.records.tolist()).values()) <= {2 * int(weight), 2 * int(weight) + 2}


def test_what_is_cached_depends_on_what_the_objective_learns(path: Path, chat: ChatTokenizer) -> None:
    records = [*many(5, 3)]
    pairs, labels = (build(path, chat, records, learns) for learns in ("pairs", "labels"))  # type: ignore[arg-type]
    assert not labels.from_cache
    assert build(path, chat, records).from_cache
    assert (len(pairs.training), len(labels.training)) == (2 * 2 * 5, 3 * 5)
    assert labels.training.labels.tolist() == [1, 0, 0] * 5
    assert len(build(path, chat, records, max_samples=2).training) == 2 * 2 * 2


# ---- What is shown


def test_both_answers_are_shown_apart(path: Path, chat: ChatTokenizer) -> None:
    corpus = build(path, chat, [*many(6)])
    lines = [*show_window(Batches(corpus.training, 2, 2, seed=0, pad_id=0), 0, corpus, chat, color=False)]
    kinds = [re.search(r"row \d, document \d of 2: (chosen|rejected): .*data\.jsonl:\d", line) for line in lines]
    assert [found[1] for found in kinds if found] == ["chosen", "rejected"] * 4
    assert ["answer 0" in line for line in lines if "⟦" in line] == [True, False] * 4
    shown = re.findall(r"==== \w+: (\w+): ", preview(corpus, chat, 0))
    assert shown == ["chosen", "rejected"] * 5
    single = build(path, chat, [*many(6)], "labels")
    lines = [*show_window(Batches(single.training, 12, 1, seed=0, pad_id=0), 0, single, chat, color=False)]
    assert Counter(re.findall(r"row \d+: (\w+): ", "\n".join(lines))) == {"desirable": 6, "undesirable": 6}
    assert set(re.findall(r"==== \w+: (\w+): ", preview(single, chat, 0))) <= {"desirable", "undesirable"}


def test_a_length_bias_and_pairs_that_hardly_differ_are_reported(path: Path, chat: ChatTokenizer) -> None:
    def warnings(longer: int, count: int = 60) -> list[str]:
        texts = [("yes, of course it is", "no") if n < longer else ("yes", "no, by no means") for n in range(count)]
        records = [{"prompt": f"Question {n}", "chosen": a, "rejected": b} for n, (a, b) in enumerate(texts)]
        return [line for line in describe_data(build(path, chat, records).report) if "answer is longer" in line]

    assert warnings(30) == warnings(34) == []
    (line,) = warnings(54)
    assert line.startswith("warning: the chosen answer is longer in 90% of the pairs")
    record = {"prompt": "Q", "answers": [SENTENCE * 3 + "a", SENTENCE * 3 + "b"]}
    corpus = build(path, chat, [record, *({"prompt": f"Q{n}", "answers": ["yes", "not at all"]} for n in range(3))])
    assert corpus.report["near_equal"] == 1
    lengths = [[int(s.is_target.sum()) for s in corpus.training][kind::2] for kind in (0, 1)]
    kinds = zip(("chosen", "rejected"), lengths, strict=True)
    means = {f"tokens per {kind} answer": round(sum(n) / 4, 1) for kind, n in kinds}
    assert corpus.report["training"]["answers"] == {"pairs": 4, **means}


@pytest.mark.parametrize("learns", ["pairs", "labels"])
def test_checks_hold_for_both_answers(learns: Learns, path: Path, chat: ChatTokenizer) -> None:
    records = [{"prompt": talk("Hi", "Yo", f"Q {n}"), "chosen": "good", "rejected": "bad"} for n in range(5)]
    checks = {check.name: check for check in check_data(build(path, chat, records, learns), chat, "assistant")}
    assert all(check.passed for check in checks.values())
    assert checks["stop"].found.startswith("10 of 10 turns end with a stop token")


ANYTHING = [
    None,
    True,
    5,
    -1.5,
    "",
    " ",
    "text",
    "\ud800",
    [],
    [[]],
    {},
    [{}],
    [{"role": "user"}],
    [{"role": 1, "content": {}}],
]
ANYTHING += [{"messages": 5}, {"messages": []}, [{"role": "assistant", "content": None}], "[{'role': 1}]", HH, "Human:"]


@pytest.mark.parametrize("learns", ["pairs", "labels"])
@pytest.mark.parametrize("name", [*PAIRS, *UNPAIRED])
def test_any_value_gives_a_sound_conversation_or_a_reason(path: Path, name: str, learns: Learns) -> None:
    record = (PAIRS | UNPAIRED)[name][0]
    if learns == "pairs" and name in UNPAIRED:
        record = record | {"chosen": "g", "rejected": "b"}
    changed = [record | {field: value} for field in record for value in ANYTHING]
    for item in read(path, [record, *changed, *([value] for value in ANYTHING)], learns)[1:]:
        if isinstance(item, Rejected):
            assert "\n" not in item.reason
            assert len(item.reason) < 300
            continue
        for messages in item.versions:
            assert messages[item.answer_at]["role"] == messages[-1]["role"] == "assistant"
            assert "user" in [m["role"] for m in messages[: item.answer_at]]
            assert messages[: item.answer_at] == item.messages[: item.answer_at]
            assert (messages[-1]["content"] + str(messages[-1].get("tool_calls", ""))).strip()
            assert all(isinstance(m["content"], str) for m in messages)
