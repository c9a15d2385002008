"""Raw records to conversations: every shape, its detection, and the rules that a conversation must satisfy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.formats import SHAPES, UNDESIRABLE, Conversation, Rejected, is_trained, read_file

SYSTEM, USER, ASSISTANT = ({"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A")))
TOOL = {"role": "tool", "content": "T"}
GOOD = {"messages": [USER, ASSISTANT]}


def turns(*said: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said], **more}


def speak(*said: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in said], **more}


def read(path: Path, records: list[Any], **reading: Any) -> tuple[str, list[Conversation], list[Rejected]]:
    """The shape, the valid and the rejected records of a file with these records."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        parts = [json.dumps(record) for record in records]
        path.write_text(f"[{','.join(parts)}]" if path.suffix == ".json" else "\n".join(parts), encoding="utf-8")
    shape, *items = read_file(path, DataConfig(**reading))
    assert isinstance(shape, str)
    good = [item for item in items if isinstance(item, Conversation)]
    bad = [item for item in items if isinstance(item, Rejected)]
    assert len(good) + len(bad) == len(items)
    return shape, good, bad


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


# ---- Shapes


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


FUNCTION = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("add", {"a": 1}, id="c1")]}


def calling(calls: Any) -> dict[str, Any]:
    return {"messages": [USER, {**CALLS, "tool_calls": calls}]}


# Name -> (shape as it is said, record, messages that it means).
READ: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "x": 1}, [SYSTEM, USER, ASSISTANT]),
    "messages as JSON": ("messages", {"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
    "left unanswered": ("messages", {"messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT]),
    "tool unanswered": ("messages", {"messages": [USER, ASSISTANT, USER, CALLS, TOOL]},
                        [USER, ASSISTANT, USER, CALLS]),
    "developer": ("messages", turns(("developer", "S"), ("user", "Q"), ("assistant", "A")),
                  [SYSTEM, USER, ASSISTANT]),
    "function role": (
        "messages",
        {"messages": [USER, CALLS, {"role": "function", "name": "add", "content": "T"}, ASSISTANT]},
        [USER, CALLS, {**TOOL, "name": "add"}, ASSISTANT],
    ),
    "tool calls": (
        "messages",
        {"messages": [
            {**USER, "name": "Eva", "tool_calls": None},
            {"role": "assistant", "tool_calls": [call("add", '{"a": 1}', id="c1")]},
            {**TOOL, "tool_call_id": "c1"},
            {**TOOL, "tool_call_id": "c2"},
            {**ASSISTANT, "tool_calls": []},
        ]},
        [{**USER, "name": "Eva"}, CALLS, {**TOOL, "tool_call_id": "c1"}, {**TOOL, "tool_call_id": "c2"}, ASSISTANT],
    ),
    "tool calls of other forms": (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": json.dumps([
            {"name": "add", "arguments": {"a": [1, None, "é"]}}, {"function": {"name": "now"}, "id": None}])}]},
        [USER, {**CALLS, "tool_calls": [call("add", {"a": [1, None, "é"]}), call("now", {})]}],
    ),
    "weight and train": (
        "messages",
        {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "train": False}]},
        [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "train": False}],
    ),
    "parts": (
        "messages",
        turns(("user", [{"type": "text", "text": "Q"}, {"text": "?"}]), ("assistant", [{"type": "text", "text": "A"}])),
        [{**USER, "content": "Q?"}, ASSISTANT],
    ),
    "reasoning": ("messages", {"messages": [USER, {**ASSISTANT, "reasoning_content": "Hm"}]},
                  [USER, {**ASSISTANT, "reasoning_content": "Hm"}]),
    "sharegpt": ("sharegpt: conversations", speak(("system", "S"), ("human", "Q"), ("gpt", "A")),
                 [SYSTEM, USER, ASSISTANT]),
    "sharegpt names": ("sharegpt: conversations", speak(*itertools.chain(*((("user", "Q"), (n, "A")) for n in (
        "assistant", "chatgpt", "bing", "bard")))), [USER, ASSISTANT] * 4),
    "sharegpt system": ("sharegpt: system, conversations", speak(("human", "Q"), ("gpt", "A"), system="S"),
                        [SYSTEM, USER, ASSISTANT]),
    "sharegpt with roles": ("sharegpt: system, conversations", {"conversations": [USER, ASSISTANT], "system": "S"},
                            [SYSTEM, USER, ASSISTANT]),
    "sharegpt tools": (
        "sharegpt: conversations",
        speak(("human", "Q"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "T"),
              ("function_response", "T"), ("tool", "T"), ("gpt", "A")),
        [USER, {**CALLS, "tool_calls": [call("add", {"a": 1})]}, TOOL, TOOL, TOOL, ASSISTANT],
    ),
    "sharegpt several calls": (
        "sharegpt: conversations",
        speak(("human", "Q"), ("function_call", '[{"name": "f", "arguments": "{}"}, {"name": "g"}]')),
        [USER, {**CALLS, "tool_calls": [call("f", {}), call("g", {})]}],
    ),
    "sharegpt weight": ("sharegpt: conversations", {"conversations": [
        {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 1, "train": True}]},
        [USER, {**ASSISTANT, "weight": 1, "train": True}]),
    "alpaca": ("alpaca: instruction, input, output", {"instruction": "Q", "input": "", "output": "A"},
               [USER, ASSISTANT]),
    "alpaca without input": ("alpaca: instruction, output", {"instruction": "Q", "output": "A"}, [USER, ASSISTANT]),
    "alpaca with all": (
        "alpaca: system, history, instruction, input, output",
        {"output": "A", "input": "X", "instruction": "Q", "history": [["Q1", "A1"], ["Q2", "A2"]], "system": "S",
         "text": "all of it"},
        turns(("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"),
              ("user", "Q\n\nX"), ("assistant", "A"))["messages"],
    ),
    "alpaca with nulls": ("alpaca: system, history, instruction, input, output",
                          {"instruction": "Q", "input": None, "output": "A", "history": None, "system": None},
                          [USER, ASSISTANT]),
    "prompt": ("prompt_completion: system, prompt, completion", {"prompt": "Q", "completion": "A", "system": "S"},
               [SYSTEM, USER, ASSISTANT]),
    "prompt of turns": ("prompt_completion: prompt, completion",
                        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "prompt of turns and system": ("prompt_completion: system, prompt, completion",
                                   {"prompt": [USER], "completion": [ASSISTANT], "system": "S"},
                                   [SYSTEM, USER, ASSISTANT]),
    "question": ("question_answer: question, answer", {"question": "Q", "answer": "A"}, [USER, ASSISTANT]),
    "question with context": (
        "question_answer: system, context, question, answer",
        {"question": "Q", "answer": "A", "context": "C", "system": "S"},
        [SYSTEM, {**USER, "content": "C\n\nQ"}, ASSISTANT],
    ),
    "summary": ("summarization: document, summary", {"document": "D", "summary": "A"},
                [{**USER, "content": "Summarize the following text.\n\nD"}, ASSISTANT]),
    "squad": (
        "extractive_qa: context, question, answers",
        {"id": "1", "context": "C", "question": "Q", "answers": {"text": ["A", "B"], "answer_start": [1]}},
        [{**USER, "content": "C\n\nQ"}, ASSISTANT],
    ),
    "squad 2": ("extractive_qa: context, question, answers",
                {"context": "C", "question": "Q", "answers": [{"text": "A", "answer_start": 0}]},
                [{**USER, "content": "C\n\nQ"}, ASSISTANT]),
    "answers as texts": ("extractive_qa: system, context, question, answers",
                         {"context": "C", "question": "Q", "answers": ["A", "B"], "system": "S"},
                         [SYSTEM, {**USER, "content": "C\n\nQ"}, ASSISTANT]),
    "answers as JSON": ("extractive_qa: context, question, answers",
                        {"context": "C", "question": "Q", "answers": '{"text": ["A"]}'},
                        [{**USER, "content": "C\n\nQ"}, ASSISTANT]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", READ)
def test_shapes(tmp_path: Path, name: str, suffix: str) -> None:
    shape, record, expected = READ[name]
    path = tmp_path / f"data{suffix}"
    said, (conversation,), bad = read(path, [record])
    assert (said, bad) == (shape, [])
    assert conversation == Conversation(expected, None, str(path), 1)
    assert conversation.prompt().startswith("\n".join(m["content"] for m in expected[:-1])[:1])
    others = [m["content"] for m in expected if m["role"] != "system"]
    assert conversation.full_text(system=False) == "\n".join(others)
    assert conversation.characters() == sum(len(m["content"]) for m in expected)
    forced = read(path, [record], format=shape.partition(":")[0])
    assert forced[:2] == (said, [conversation])


def test_every_shape_is_tested() -> None:
    plain = {"text", "raw_prompt_completion"}
    assert {said.partition(":")[0] for said, _, _ in READ.values()} | plain == set(SHAPES)


def test_plain_text(path: Path) -> None:
    said, (conversation,), (bad,) = read(path, [{"text": "Once\nupon"}, {"text": " \n"}])
    assert said == "text"
    assert conversation == Conversation([], "Once\nupon", str(path), 1)
    assert conversation.prompt() == "Once\nupon"
    assert conversation.characters() == 9
    assert bad == Rejected("text is empty", str(path), 2)


def test_a_raw_prompt_and_completion(path: Path) -> None:
    record = {"prompt": "2+2=", "completion": "4"}
    said, (conversation,), _ = read(path, [record], format="raw_prompt_completion")
    assert said == "raw_prompt_completion: prompt, completion"
    assert conversation == Conversation([], "2+2=4", str(path), 1, prompt_characters=4)
    assert conversation.prompt() == "2+2="
    assert read(path, [record])[0] == "prompt_completion: prompt, completion"  # never by itself
    _, _, (bad,) = read(path, [{**record, "completion": " "}], format="raw_prompt_completion")
    assert bad.reason == "completion is empty"


def test_datasets_that_people_use_are_read(path: Path) -> None:
    dolly = {"instruction": "Q", "context": "X", "response": "A", "category": "closed_qa"}
    said, good, _ = read(path, [dolly, {**dolly, "context": ""}, {**dolly, "context": None}, {**dolly, "context": 0}])
    assert said == "alpaca: instruction, input (context), output (response)"
    assert [c.messages[0]["content"] for c in good] == ["Q\n\nX", "Q", "Q", "Q\n\n0"]
    orca = {"id": "niv.1", "system_prompt": "S", "question": "Q", "response": "A"}
    said, good, _ = read(path, [orca, {**orca, "system_prompt": ""}])
    assert said == "question_answer: system (system_prompt), question, answer (response)"
    assert [c.messages for c in good] == [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT]]
    for document, summary in (("article", "highlights"), ("dialogue", "summary"), ("text", "summary")):
        said, (conversation,), _ = read(path, [{document: "D", summary: "A", "id": "1", "topic": "x"}])
        assert said.startswith(f"summarization: document ({document}), summary")
        assert conversation.messages == READ["summary"][2]
    said, (conversation,), _ = read(path, [{"instruction": "Q", "output": "A", "context": "X"}])  # not dropped
    assert conversation.messages[0]["content"] == "Q\n\nX"


def test_a_misspelled_name_in_columns_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.columns: 'sytem' is not a field of alpaca: did you mean system\?"):
        read(path, [{"instruction": "Q", "output": "A", "persona": "S"}], columns={"sytem": "persona"})


# Role -> its other names; the names of a call, of the assistant, are those of function_call.
OTHER_ROLES = {
    "system": ["System", "developer"],
    "user": ["User", "human", "Human", "HUMAN", "prompter"],
    "assistant": ["Assistant", "gpt", "GPT", "chatgpt", "ai", "AI", "model", "Model", "bot"],
    "tool": ["function", "observation", "ipython", "tool-response", "function response"],
    "function_call": ["function_call", "function-call", "tool_call", "Tool Call"],
}


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("field", ["messages", "conversations", "chat"])
def test_roles_have_other_names(path: Path, field: str, keys: tuple[str, str]) -> None:
    for role, names in OTHER_ROLES.items():
        for name in names:
            said = {"system": "S", "user": "Q", "assistant": "A", "tool": "T", "function_call": '{"name": "add"}'}
            order = ["system", "user", "function_call", "tool", "assistant"]
            given = [{keys[0]: name if other == role else other, keys[1]: said[other]} for other in order]
            _, (conversation,), _ = read(path, [{field: given}])
            called = {**CALLS, "tool_calls": [call("add", {})]}
            assert conversation.messages == [SYSTEM, USER, called, TOOL, ASSISTANT], name


def test_roles_are_mapped(path: Path) -> None:
    roles = {"agent": "assistant", "Customer": "user", "model": "user"}
    records = [turns(("Customer", "Q"), ("agent", "A")), speak(("model", "Q"), ("agent", "A"))["conversations"]]
    _, (conversation,), _ = read(path, records[:1], roles=roles)
    assert conversation.messages == [USER, ASSISTANT]
    _, (conversation,), _ = read(path, [{"prompt": records[1][:1], "completion": records[1][1:]}], roles=roles)
    assert conversation.messages == [USER, ASSISTANT]
    with pytest.raises(UserError, match=r"data\.roles: 'asistant' is not a role: did you mean assistant\?"):
        list(read_file(path, DataConfig(roles={"agent": "asistant"})))


def test_only_the_completion_of_a_conversation_is_learned(path: Path) -> None:
    again = {"role": "user", "content": "Q2"}
    prompt = [USER, ASSISTANT, again]
    learned = [USER, {**ASSISTANT, "weight": 0}, again, ASSISTANT]
    for completion in ([ASSISTANT], "A", ASSISTANT):
        _, (conversation,), _ = read(path, [{"prompt": prompt, "completion": completion}])
        assert conversation.messages == learned
    _, (conversation,), _ = read(path, [{"prompt": "Q", "completion": [ASSISTANT, again, ASSISTANT]}])
    assert conversation.messages == [USER, ASSISTANT, again, ASSISTANT]


def test_an_empty_instruction_leaves_no_newlines(path: Path) -> None:
    for instruction in ("", " \n", None):
        _, (conversation,), _ = read(path, [{"instruction": instruction, "input": "Q", "output": "A"}])
        assert conversation.messages == [USER, ASSISTANT]
    _, _, (bad,) = read(path, [{"instruction": "", "input": "", "output": "A"}])
    assert bad.reason == "a user message is empty"


def test_numbers_are_texts(path: Path) -> None:
    numbers = [2, 0, -1.5, 10**20, 1e22]
    _, good, bad = read(path, [{"question": "Q", "answer": number} for number in numbers])
    assert ([c.messages[1]["content"] for c in good], bad) == (["2", "0", "-1.5", "100000000000000000000", "1e+22"], [])
    _, (conversation,), _ = read(path, [turns(("user", 2), ("assistant", [{"type": "text", "text": 5}]))])
    assert [m["content"] for m in conversation.messages] == ["2", "5"]


def test_what_a_tool_returned_is_text(path: Path) -> None:
    for returned in ({"temp": 18, "ü": None}, [{"temp": 18}], [1, 2], []):
        given = {"messages": [USER, CALLS, {"role": "tool", "content": returned}, ASSISTANT]}
        _, (conversation,), _ = read(path, [given])
        assert conversation.messages[2]["content"] == json.dumps(returned, ensure_ascii=False)
    _, (conversation,), _ = read(path, [{"messages": [USER, CALLS, {"role": "tool", "content": [{"text": "T"}]}]}])
    _, (conversation,), _ = read(path, [{"messages": [USER, CALLS, {**TOOL, "content": [{"text": "T"}]}, ASSISTANT]}])
    assert conversation.messages[2] == TOOL


def test_tools_as_a_list_of_json_and_calls_without_arguments(path: Path) -> None:
    calls = {**CALLS, "tool_calls": [{"function": {"name": "add", "arguments": ""}}]}
    _, (conversation,), _ = read(path, [{"messages": [USER, calls], "tools": [json.dumps(FUNCTION)]}])
    assert conversation.tools == [FUNCTION]
    assert conversation.messages[1]["tool_calls"] == [call("add", {})]


def test_nulls_of_arrow_structs_are_no_arguments_and_those_of_json_are(tmp_path: Path) -> None:
    first = {"messages": [USER, {**CALLS, "tool_calls": [call("a", {"city": "Rome", "in": [{"x": 1}]})]}]}
    second = {"messages": [USER, {**CALLS, "tool_calls": [call("b", {"n": 2, "in": [{"y": None}]})]}]}
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {"properties": {"city": {"type": "string"}}}}}
    ]
    records = [first | {"tools": tools}, second | {"tools": [{"name": "b"}]}]

    def arguments(good: list[Conversation]) -> list[Any]:
        return [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in good]

    _, good, _ = read(tmp_path / "data.parquet", records)
    assert arguments(good) == [{"city": "Rome", "in": [{"x": 1}]}, {"n": 2, "in": [{}]}]
    assert [c.tools for c in good] == [tools, [{"name": "b"}]]
    _, good, _ = read(tmp_path / "data.jsonl", records)
    assert arguments(good)[1] == {"n": 2, "in": [{"y": None}]}
    as_text = {"messages": [USER, {**CALLS, "tool_calls": [call("b", '{"n": null}')]}]}
    _, good, _ = read(tmp_path / "data.parquet", [as_text])
    assert arguments(good) == [{"n": None}]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("tools", [[FUNCTION], [FUNCTION["function"]], [FUNCTION, {"name": "é"}], [], None, ""])
def test_tools(path: Path, tools: Any, as_text: bool) -> None:
    field = json.dumps(tools) if as_text and tools else tools
    records = [GOOD | {"tools": field}, {"conversations": [USER, ASSISTANT], "tools": field}]
    for record in [*records, {"prompt": [USER], "completion": [ASSISTANT], "tools": field}]:
        said, (conversation,), _ = read(path, [record])
        assert conversation.tools == (tools or None)
        assert said.endswith(", tools")


def test_tools_of_a_shape_without_tools_are_another_thing(path: Path) -> None:
    said, (conversation,), _ = read(path, [{"instruction": "Q", "output": "A", "tools": "a hammer"}])
    assert (said, conversation.tools) == ("alpaca: instruction, output", None)


# ---- Records that cannot be used

DEEP: Any = "x"
for _ in range(400):
    DEEP = {"a": DEEP}
ASKED = ("user", "Q")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "role": (turns(("agent", "A")), "unknown role 'agent': set data.roles='{agent: user}' or data.roles='{agent: "),
    "nobody answers": (turns(("system", "S"), ASKED), "no assistant message, so there are no target tokens"),
    "assistant first": (turns(("assistant", "A"), ASKED), "from the assistant: there is no prompt"),
    "empty user": (turns(("user", "\n"), ("assistant", "A")), "a user message is empty"),
    "empty assistant": (turns(ASKED, ("assistant", "")), "an assistant message is empty"),
    "empty parts": (turns(ASKED, ("assistant", [])), "an assistant message is empty"),
    "empty in the tail": (turns(ASKED, ("assistant", "A"), ("user", "")), "a user message is empty"),
    "image": (turns(("user", [{"type": "image_url"}]), ("assistant", "A")), "content: has a part of type 'image_url'"),
    "part without text": (turns(("user", [{"type": "text"}]), ("assistant", "A")), "a part has no text: its fields"),
    "name": ({"messages": [{**USER, "name": []}, ASSISTANT]}, "name: [] is not a string"),
    "truth": (turns(ASKED, ("assistant", True)), "content: true is not a string"),
    "null turn": ({"messages": [None, USER, ASSISTANT]}, "messages: a turn needs a role and content, found null"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "messages: a turn has no content: its fields are role"),
    "reasoning": ({"messages": [USER, {**ASSISTANT, "reasoning_content": []}]}, "content: [] is not a string"),
    "weight": ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weight must be 0 or 1, train must be true or"),
    "train": ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, "weight must be 0 or 1, train must be true or"),
    "long weight": ({"messages": [USER, {**ASSISTANT, "weight": "x" * 999}]}, "weight must be 0 or 1"),
    "user calls": ({"messages": [{**CALLS, "role": "user"}, ASSISTANT]}, "tool_calls: 'user' cannot call tools"),
    "calls as object": (calling({"name": "f"}), 'tool_calls: "name" is not a function call with a name'),
    "call without name": (calling([{"x": 1}]), 'tool_calls: {"x": 1} is not a function call with a name'),
    "call with an empty name": (calling([call(" ", {})]), "a tool's name is empty"),
    "call as text": (calling(["f()"]), 'tool_calls: "f()" is not a function call with a name'),
    "arguments": (calling([call("f", "{a: 1}")]), "arguments: not valid JSON"),
    "arguments as list": (calling([call("f", [1])]), "arguments [1] are not a JSON object"),
    "half in arguments": (calling([call("f", {"a": ["\ud800"]})]), "arguments: contains a lone surrogate"),
    "garbage in a name": (calling([call("f", {"\ufdd0": 1})]), "contains a reserved Unicode noncharacter (U+FDD0)"),
    "deep arguments": (calling([call("f", DEEP)]), "arguments: nested too deeply"),
    "tools": (GOOD | {"tools": 5}, "tools: expected a list of functions with names"),
    "tools as object": (GOOD | {"tools": FUNCTION}, "tools: expected a list of functions with names"),
    "tools without name": (GOOD | {"tools": [{"type": "function", "function": {}}]}, "tools: expected a list of fun"),
    "tools as texts": (GOOD | {"tools": ["add"]}, "tools: not valid JSON"),
    "tools as numbers": (GOOD | {"tools": [5]}, "tools: expected a list of functions with names"),
    "tools no JSON": (GOOD | {"tools": "[add]"}, "tools: not valid JSON"),
    "deep tools": (GOOD | {"tools": [{"name": "f", "parameters": DEEP}]}, "tools: nested too deeply"),
    "half in tools": (GOOD | {"tools": [{"name": "f", "description": "\udc80"}]}, "tools: contains a lone surrogate"),
    "deep content": (turns(ASKED, ("assistant", DEEP)), "is not a string"),
    "speaker": (speak(("alien", "Q")), "unknown role 'alien'"),
    "speaker as list": (speak(([], "Q")), "conversations: the role [] is not a string"),
    "no speaker": ({"conversations": [{"value": "Q"}]}, "conversations: a turn has no role: its fields are content"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations: a turn has no content: its fields are role"),
    "function call": (speak(("human", "Q"), ("function_call", "add(1)")), "function_call: not valid JSON"),
    "conversations of texts": ({"conversations": ["Q", "A"]}, 'a turn needs a role and content, found "Q"'),
    "output null": ({"instruction": "Q", "output": None}, "output: null is not a string"),
    "input list": ({"instruction": "Q", "input": ["X"], "output": "A"}, 'input: ["X"] is not a string'),
    "system list": ({"instruction": "Q", "output": "A", "system": [3]}, "system: [3] is not a string"),
    "history of texts": ({"instruction": "Q", "output": "A", "history": ["ab", "cd"]}, "history is not a list of [q"),
    "history of objects": ({"instruction": "Q", "output": "A", "history": [{"q": "Q", "a": "A"}]}, "history is not a"),
    "history of threes": ({"instruction": "Q", "output": "A", "history": [["a", "b", "c"]]}, "history is not a list"),
    "history of nulls": ({"instruction": "Q", "output": "A", "history": [["a", None]]}, "null is not a string"),
    "history as object": ({"instruction": "Q", "output": "A", "history": {"ab": 1}}, "history is not a list"),
    "completion empty": ({"prompt": "Q", "completion": ""}, "an assistant message is empty"),
    "prompt without turns": ({"prompt": [], "completion": [ASSISTANT]}, "prompt is not a list of turns"),
    "answer list": ({"question": "Q", "answer": ["A"]}, 'answer: ["A"] is not a string'),
    "context list": ({"question": "Q", "answer": "A", "context": [5]}, "context: [5] is not a string"),
    "summary infinite": ({"document": "D", "summary": math.inf}, "summary: Infinity is not a string"),
    "no answers": ({"context": "C", "question": "Q", "answers": {"text": [], "answer_start": []}}, "answers: is empty"),
    "answers null": ({"context": "C", "question": "Q", "answers": None}, "answers: is empty"),
    "answers without text": ({"context": "C", "question": "Q", "answers": {"a": 1}}, "not have the form of extractive"),
    "text null": ({"text": None}, "text: null is not a string"),
    "text garbage": ({"text": "a\ufffeb"}, "text: contains a reserved Unicode noncharacter (U+FFFE)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_set_aside_with_their_line_and_reason(path: Path, name: str) -> None:
    record, reason = BAD[name]
    _, good, (bad,) = read(path, [record])
    assert good == []
    assert (bad.file, bad.line) == (str(path), 1)
    assert reason in bad.reason
    assert len(bad.reason) < 250
    assert "\n" not in bad.reason
    assert bad.reason.encode("utf-8")


def test_a_bad_record_stands_alone(path: Path) -> None:
    records = [GOOD] * 7 + [{"messages": 0}] + [GOOD] * 12
    _, good, (bad,) = read(path, records)
    assert [c.line for c in good] == [n for n in range(1, 21) if n != 8]
    assert bad == Rejected("messages is not a list of turns", str(path), 8)


GARBAGE = {chr(n) for n in (*range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0), 0xFFFE, 0xFFFF)}


def test_garbage_is_all_and_only_what_no_text_has(path: Path) -> None:
    characters = [chr(n) for n in (*range(0x3100), *range(0xD7F0, 0x10010), 0x1F600)]
    _, good, bad = read(path, [{"text": f"a{character}b"} for character in characters])
    assert {characters[item.line - 1] for item in bad} == GARBAGE & set(characters)
    assert [c.text for c in good] == [f"a{character}b" for character in characters if character not in GARBAGE]


def test_no_depth_is_too_deep_to_be_reported(tmp_path: Path) -> None:
    """A record that the JSON reader accepts may be too deep for the code that formats the message."""
    reasons: list[str] = []
    for depth in range(800, 1001):
        deep = "[" * depth + "]" * depth
        (tmp_path / "a.json").write_text(f'[{{"conversations": [{{"role": "user", "content": {deep}}}]}}]')
        try:
            reasons += [
                item.reason for item in read_file(tmp_path / "a.json", DataConfig()) if isinstance(item, Rejected)
            ]
        except UserError as error:
            reasons.append(str(error))
    assert len(reasons) == 201
    assert "is not a string" in reasons[0]
    assert reasons[-1] == f"{tmp_path / 'a.json'}: nested too deeply"


# ---- Telling the shape

ALPACA = {"instruction": "Q", "input": "", "output": "A"}


def test_the_shape_is_told_from_the_majority(path: Path) -> None:
    odd: list[Any] = [{"text": "not like the others"}, [1, 2], None]
    said, good, bad = read(path, odd + [ALPACA] * 5)
    assert (said, len(good)) == ("alpaca: instruction, input, output", 5)
    assert [(item.line, item.reason) for item in bad] == [
        (1, "expected the fields instruction, output, found text"),
        (2, "expected the fields instruction, output, found list"),
        (3, "expected the fields instruction, output, found NoneType"),
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_shape_is_told_from_the_first_thousand(tmp_path: Path, suffix: str) -> None:
    records = [ALPACA] * 499 + [GOOD] * 501 + [ALPACA | {"system": "S"}] * 1000
    said, good, bad = read(tmp_path / f"data{suffix}", records)
    assert (said, len(good), len(bad)) == ("messages", 501, 1499)
    assert {item.reason for item in bad} >= {"expected the fields messages, found instruction, input, output"}
    said, good, _ = read(tmp_path / f"data{suffix}", [ALPACA] * 1000 + [ALPACA | {"system": "S"}])
    assert said == "alpaca: instruction, input, output"  # of the first thousand
    assert good[-1].messages[0] == SYSTEM  # but all are read alike


def test_the_said_fields_are_those_of_any_of_them(path: Path) -> None:
    records = [{"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": "A", "history": [], "z": 1}]
    assert read(path, records)[0] == "alpaca: history, instruction, output"


AMBIGUOUS: dict[str, tuple[list[Any], str]] = {
    "both in each": (
        [{"messages": [USER, ASSISTANT], "prompt": "P", "completion": "C"}],
        "choose data.format=messages (messages) or data.format=prompt_completion (prompt, completion)",
    ),
    "three": (
        [{"context": "C", "question": "Q", "answer": "A", "answers": ["A"], "document": "D", "summary": "S"}],
        "fit 3 shapes: choose data.format=question_answer (question, answer) or data.format=summarization "
        "(document, summary) or data.format=extractive_qa (context, question, answers)",
    ),
    "half and half": (
        [GOOD, ALPACA],
        "choose data.format=messages (messages) or data.format=alpaca (instruction, output)",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_not_guessed(path: Path, name: str) -> None:
    records, choices = AMBIGUOUS[name]
    with pytest.raises(UserError) as raised:
        read(path, records)
    assert str(raised.value).startswith(f"{path}: its records fit ")
    assert choices in str(raised.value)
    assert "\n" not in str(raised.value)
    for choice in choices.split("data.format=")[1:]:
        said, good, _ = read(path, records, format=choice.split()[0])
        assert said.startswith(choice.split()[0])
        assert good


def test_a_plain_text_beside_other_fields_is_not_ambiguous(path: Path) -> None:
    assert read(path, [ALPACA | {"text": "T"}])[0] == "alpaca: instruction, input, output"
    assert read(path, [ALPACA | {"text": "T"}], format="text")[1][0].text == "T"


UNKNOWN: dict[str, tuple[list[Any], str]] = {
    "fields": (
        [{"q": "Q", "a": "A"}],
        ": unknown shape: its first record has the fields q, a: map them with data.colu",
    ),
    "list": ([["Q", "A"]], ": unknown shape: its first record has no fields, but is a str"),
    "newlines": ([{"a\nb": 1}], r"has the fields a\nb: map them"),
    "many": ([{f"field {n}": n for n in range(1000)}], "has the fields field 0, field 1, "),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_shape_says_what_there_is(path: Path, name: str) -> None:
    records, reason = UNKNOWN[name]
    with pytest.raises(UserError) as raised:
        read(path, records)
    assert str(raised.value).startswith(str(path))
    assert reason in str(raised.value)
    assert str(raised.value).endswith("extractive_qa (context, question, answers); text (text)")
    assert len(str(raised.value)) < len(str(path)) + 600


def test_nothing_but_bad_lines_names_the_first(path: Path) -> None:
    path.write_text("\n\n{oh\nno}\n")
    with pytest.raises(UserError, match=r"data\.jsonl: not valid JSON: .* line 3 column 2"):
        list(read_file(path, DataConfig()))


# ---- Columns, labels, fields

COLUMNS: dict[str, tuple[dict[str, str], dict[str, Any], str, list[dict[str, Any]]]] = {
    "alpaca": ({"instruction": "q", "output": "a"}, {"q": "Q", "a": "A"}, "alpaca: instruction, output",
               [USER, ASSISTANT]),
    "response": ({"instruction": "q", "response": "a"}, {"q": "Q", "a": "A"}, "alpaca: instruction, output (response)",
                 [USER, ASSISTANT]),
    "one of them": ({"output": "reply"}, {"instruction": "Q", "reply": "A"}, "alpaca: instruction, output",
                    [USER, ASSISTANT]),
    "swapped": ({"question": "answer", "answer": "question"}, {"question": "A", "answer": "Q"},
                "question_answer: question, answer", [USER, ASSISTANT]),
    "over another": ({"prompt": "q", "completion": "prompt"}, {"q": "Q", "prompt": "A"},
                     "prompt_completion: prompt, completion", [USER, ASSISTANT]),
    "a shape less": ({"messages": "chat", "z": "prompt"}, {"chat": [USER, ASSISTANT], "prompt": "P", "completion": "C"},
                     "messages", [USER, ASSISTANT]),
    "an option": ({"system": "persona"}, {"instruction": "Q", "output": "A", "persona": "S"},
                  "alpaca: system, instruction, output", [SYSTEM, USER, ASSISTANT]),
    "one for two": ({"question": "x", "answer": "x"}, {"x": "A"}, "question_answer: question, answer",
                    [{**USER, "content": "A"}, ASSISTANT]),
    "replaced": ({"instruction": "q"}, {"instruction": "old", "q": "Q", "output": "A"}, "alpaca: instruction, output",
                 [USER, ASSISTANT]),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_renamed(path: Path, name: str) -> None:
    columns, record, shape, expected = COLUMNS[name]
    said, (conversation,), _ = read(path, [record], columns=columns)
    assert (said, conversation.messages) == (shape, expected)


def test_a_renamed_column_is_gone(path: Path) -> None:
    with pytest.raises(UserError, match="has the fields instruction, old: map"):
        read(path, [{"instruction": "Q", "output": "A"}], columns={"old": "output"})


def test_a_record_without_the_column_is_bad(path: Path) -> None:
    _, (good,), (bad,) = read(path, [{"q": "Q", "answer": "A"}, {"answer": "A"}], columns={"question": "q"})
    assert (good.line, bad.line) == (1, 2)
    assert bad.reason == "has no column 'q' (data.columns)"
    with pytest.raises(UserError, match=r"data\.jsonl:1: has no column 'z' \(data\.columns\)"):
        read(path, [{"question": "Q", "answer": "A"}], columns={"context": "z"})


LABELS: list[tuple[Any, bool | None]] = [
    *((label, True) for label in (True, 1, "true", "True", " GOOD ", "1", "desirable", "chosen", "yes", 1.0, "1.0")),
    *((label, False) for label in (False, 0, "false", "undesirable", "rejected", "Bad", "no", "0", 0.0)),
    *((label, None) for label in (None, 2, -1, "", "maybe", [], [True], {"label": True}, "\ud800", "x" * 999)),
]


def test_labels(path: Path) -> None:
    records = [{"prompt": "Q", "completion": "A", "label": label} for label, _ in LABELS] + [ALPACA]
    said, good, bad = read(path, [*records, {"prompt": "Q", "completion": "A"}], label_field="label")
    assert said == "prompt_completion: prompt, completion"
    outcome = dict.fromkeys((c.line for c in good), True) | {item.line: False for item in bad}
    undesirable = {item.line for item in bad if item.reason == UNDESIRABLE}
    for line, (label, kept) in enumerate(LABELS, start=1):
        assert outcome[line] is (kept is True), label
        assert (line in undesirable) is (kept is False), label
    unknown = [item.reason for item in bad if "is neither desirable nor undesirable" in item.reason]
    assert len(unknown) == sum(kept is None for _, kept in LABELS)
    assert max(map(len, unknown)) < 200
    assert bad[-1].reason == "has no field 'label' (data.label_field)"
    assert all(item.reason.encode("utf-8") for item in bad)


def test_fields_are_kept_for_the_split(path: Path) -> None:
    records: list[Any] = [
        {"text": "a", "user": "Eva", "time": 5, "z": 1},
        {"text": "b", "user": True, "time": 1.5},
        {"text": "c", "user": "", "time": "2024-02-29"},
        *[{"text": "d", "user": None, "time": 1}, {"text": "d", "user": [], "time": 1}],
        *[{"text": "d", "user": {"a": 1}, "time": 1}, {"text": "d", "user": "\ud800", "time": 1}],
        {"text": "e", "time": 1},
    ]
    _, good, bad = read(path, records, split_time="time", split_group="user")
    assert [c.fields for c in good] == [
        {"time": 5, "user": "Eva"},
        {"time": 1.5, "user": True},
        {"time": "2024-02-29", "user": ""},
    ]
    assert [item.reason.split(":")[0] for item in bad] == ["user"] * 5
    assert "cannot be used to split the data" in bad[1].reason


def test_fields_of_a_table_with_dates(tmp_path: Path) -> None:
    from datetime import datetime

    date, nan = datetime(2024, 2, 29, 12), float("nan")
    rows = [{"text": "a", "time": date, "x": 1.0}, {"text": "a", "time": None, "x": 1.0}, {"text": "a", "x": nan}]
    _, (good,), bad = read(tmp_path / "data.parquet", rows, split_time="time")
    assert good.fields == {"time": "2024-02-29 12:00:00"}
    assert len(bad) == 2
    _, good_ones, (bad_one,) = read(tmp_path / "data.parquet", rows, split_time="x")
    assert (len(good_ones), bad_one.line) == (2, 3)
    nested = [{"text": "a", "time": [date]}]
    _, _, (bad_one,) = read(tmp_path / "data.parquet", nested, split_time="time")
    assert bad_one.reason.startswith('time: ["2024-02-29 12:00:00"] cannot be used')


def test_values_that_json_has_not_are_no_arguments(tmp_path: Path) -> None:
    calls = {**CALLS, "tool_calls": [call("f", {"a": b"bytes"})]}
    _, _, (bad,) = read(tmp_path / "data.parquet", [{"messages": [USER, calls]}])
    assert bad.reason == "arguments: contains a value of type bytes, which JSON cannot represent"


# ---- Some lines only


@pytest.mark.parametrize("wanted", [{1}, {4, 2}, {1500}, {3, 2000}, {5000}, set()])
def test_only_some_lines(path: Path, wanted: set[int]) -> None:
    path.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(1, 2001)))
    said, *items = read_file(path, DataConfig(), only=wanted)
    assert said == "text"
    assert [(c.line, c.text) for c in items if isinstance(c, Conversation)] == [
        (n, str(n)) for n in sorted(wanted) if n <= 2000
    ]
    assert len(items) == len([n for n in wanted if n <= 2000])


def test_reading_ends_with_the_last_line_that_is_wanted(path: Path) -> None:
    path.write_bytes(b'{"text": "x"}\n' * 2000)
    ticks: list[int] = []
    assert len(list(read_file(path, DataConfig(), ticks.append, only={3}))) == 2
    assert path.stat().st_size not in ticks
    ticks.clear()
    assert len(list(read_file(path, DataConfig(), ticks.append))) == 2001
    assert ticks[-1] == path.stat().st_size


# ---- Any record whatever

TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # also halves of characters
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OFTEN = st.sampled_from(["Q", "A\nB", "[]", "{}", '[{"name": "f"}]', "é"])


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of twelve is any value."""
    return st.integers(0, 11).flatmap(lambda n: VALUES if n == 11 else good)


ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=2)
CALL = st.fixed_dictionaries(
    {"name": mostly(OFTEN)}, optional={"arguments": mostly(ARGUMENTS), "id": mostly(OFTEN), "function": VALUES}
)
CONTENT = mostly(OFTEN | st.lists(st.fixed_dictionaries({"text": mostly(OFTEN)}), max_size=2))
EXTRA = {
    "tool_calls": mostly(st.lists(CALL, max_size=2)),
    "weight": mostly(st.sampled_from([None, 0, 1])),
    "train": mostly(st.booleans()),
    "reasoning_content": mostly(OFTEN),
}
ROLES = ["system", "user", "assistant", "tool", "function", "developer"]
SPEAKERS = ["system", "human", "gpt", "observation", "function_call"]


def alternating(kind: str, content: str, kinds: list[str]) -> st.SearchStrategy[Any]:
    """Turns that mostly alternate: questions and answers, now and then something else."""

    def turn(name: st.SearchStrategy[Any], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({kind: name, content: CONTENT}, optional=optional)

    pair = st.tuples(turn(st.just(kinds[1])), turn(st.just(kinds[2]), **EXTRA))
    other = st.tuples(turn(mostly(st.sampled_from(kinds)), **EXTRA))
    parts = st.lists(st.one_of(pair, pair, other), min_size=1, max_size=3)
    return parts.map(lambda found: list(itertools.chain(*found)))


SPECIAL = {
    "messages": alternating("role", "content", ROLES),
    "conversations": alternating("from", "value", SPEAKERS) | alternating("role", "content", ROLES),
    "tools": st.lists(CALL, max_size=2),
    "history": st.lists(st.lists(OFTEN, min_size=2, max_size=2), max_size=2),
    "answers": st.lists(OFTEN, max_size=2) | st.fixed_dictionaries({"text": st.lists(OFTEN, max_size=2)}),
}


def record_of(shape: str) -> st.SearchStrategy[Any]:
    """A record with the fields of a shape, whose values are often as they should be."""
    required, known = SHAPES[shape].required, SHAPES[shape].fields
    fields = {name: mostly(SPECIAL.get(name, OFTEN)) for name in (*known, "label")}
    optional = {name: fields.pop(name) for name in list(fields) if name not in required}
    return st.fixed_dictionaries(fields, optional=optional)


RECORDS = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda shape: st.tuples(st.just(shape), st.lists(mostly(record_of(shape)), min_size=1, max_size=4))
)


def assert_sound(c: Conversation) -> None:
    """Assert the properties that later stages rely on."""
    if c.text is not None:
        assert (c.messages, c.tools) == ([], None)
        assert c.text.strip()
        assert not GARBAGE & set(c.text)
        return
    roles = [message["role"] for message in c.messages]
    assert set(roles) <= {"system", "user", "assistant", "tool"}
    assert "user" in roles
    assert roles[-1] == "assistant"
    for message in c.messages:
        assert set(message) <= {
            "role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content", "weight", "train"
        }  # fmt: skip
        assert isinstance(message["content"], str)
        may_be_empty = message["role"] in ("system", "tool") or message.get("tool_calls") or not is_trained(message)
        assert message["content"].strip() or may_be_empty
        assert message["role"] == "assistant" or "tool_calls" not in message
        assert message.get("weight", 1) in (0, 1)
        assert message.get("train", True) in (False, True)
        for made in message.get("tool_calls", []):
            assert set(made) - {"id"} == {"type", "function"}
            assert made["function"]["name"].strip()
            assert isinstance(made["function"]["arguments"], dict)
    assert c.tools is None or all(isinstance(t.get("function", t)["name"], str) for t in c.tools)
    texts = [value for value in [c.messages, c.tools] if value is not None]
    assert not GARBAGE & set("".join(all_texts(texts)))
    assert c.prompt().strip()


def all_texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inside for text in all_texts(item)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "any.jsonl"


ANY = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@ANY
@given(
    drawn=RECORDS, auto=st.booleans(), reading=st.sampled_from([{}, {"label_field": "label"}, {"split_group": "label"}])
)
def test_any_record_becomes_a_sound_conversation_or_a_reason(
    scratch: Path, drawn: tuple[str, list[Any]], auto: bool, reading: dict[str, Any]
) -> None:
    shape, records = drawn
    records = [*records, {}]  # without an object on a line, the file is read as one JSON text
    try:
        _, good, bad = read(scratch, records, format="auto" if auto else shape, **reading)
    except UserError as error:
        assert auto
        messages = [str(error)]
        assert messages[0].startswith(f"{scratch}:")
    else:
        messages = [item.reason for item in bad]
        assert {c.line for c in good} | {item.line for item in bad} == set(range(1, len(records) + 1))
        for conversation in good:
            assert_sound(conversation)
    for message in messages:
        assert "\n" not in message
        assert message.encode("utf-8")
        assert len(message) < 1000


@pytest.mark.slow
def test_the_drawn_records_are_not_all_bad(scratch: Path) -> None:
    """Otherwise the test above would test little."""
    counts = dict.fromkeys(SHAPES, 0)

    @settings(ANY, max_examples=1000, database=None)
    @given(drawn=RECORDS)
    def count(drawn: tuple[str, list[Any]]) -> None:
        shape, records = drawn
        counts[shape] += len(read(scratch, [*records, {}], format=shape)[1])

    count()
    assert min(counts.values()) >= 1, counts
