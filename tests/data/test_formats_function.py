"""data.format: a function of the user's own, and names that do not exist."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.config.loading import load_config
from nanoft.data.formats import Conversation, Rejected, check_format, format_function, read_file

MODULE = """
def messages(record):
    return [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]

def table(record):
    return {"messages": messages(record), "tools": record["tools"]}

def pair(record):
    return {"prompt": record["q"], "completion": record["a"]}

def text(record):
    return record["q"] + record["a"]

def anything(record):
    return record["x"]

constant = 3
"""
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
RECORD = {"q": "Q", "a": "A"}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_formats.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_formats", raising=False)
    return tmp_path / "data.jsonl"


def read(path: Path, records: list[Any], function: str, **options: Any) -> list[Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    shape, *items = read_file(path, DataConfig(format=f"my_formats:{function}", **options))
    assert shape == f"my_formats:{function}"
    return items


@pytest.mark.parametrize("function", ["messages", "pair"])
def test_messages_and_pairs(path: Path, function: str) -> None:
    assert read(path, [RECORD], function) == [Conversation([USER, ASSISTANT], None, str(path), 1)]


def test_tools_and_plain_text(path: Path) -> None:
    tools = [{"name": "add"}]
    (found,) = read(path, [RECORD | {"tools": tools}], "table")
    assert (found.messages, found.tools) == ([USER, ASSISTANT], tools)
    assert read(path, [RECORD], "text") == [Conversation([], "QA", str(path), 1)]


def test_columns_labels_and_fields_are_those_of_the_record(path: Path) -> None:
    records = [{"question": "Q", "a": "A", "good": True, "user": 5}, {"question": "Q", "a": "A", "good": 0, "user": 5}]
    found = read(path, records, "pair", columns={"q": "question"}, label_field="good", split_group="user")
    assert found[0].fields == {"good": True, "user": 5}
    assert found[1] == Rejected("undesirable label", str(path), 2, "undesirable label")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "the function returned NoneType: return the fields of a shape"),
        (5, "the function returned int"),
        ({"question": "Q"}, "the function returned the fields question"),
        ([], "messages is not a list of turns"),
        ([USER], "no assistant message"),
        ([USER, 5], "messages: a turn needs a role and content, found 5"),
        ({"prompt": "Q", "completion": ""}, "an assistant message is empty"),
        ("a\ufdd0", "text: contains a reserved Unicode noncharacter (U+FDD0)"),
    ],
)
def test_a_malformed_result_is_a_rejected_record(path: Path, returned: Any, reason: str) -> None:
    good, bad = read(path, [{"x": [USER, ASSISTANT]}, {"x": returned}], "anything")
    assert isinstance(good, Conversation)
    assert (bad.file, bad.line) == (str(path), 2)
    assert reason in bad.reason
    assert "\n" not in bad.reason


def test_a_record_that_is_no_object_is_rejected(path: Path) -> None:
    _, bad = read(path, [RECORD, [1]], "pair")
    assert bad.reason == "expected an object, found list"


def test_an_error_of_the_function_names_file_and_line(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(path, [RECORD, {"q": "Q"}], "pair")
    assert str(caught.value) == f"{path}:2: data.format=my_formats:pair: KeyError: 'a'"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_formats:absent", "data.format: my_formats:absent: AttributeError"),
        ("my_formats:constant", "not a function: define def constant(record)"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("mesages", "'mesages' is not known: did you mean messages?"),
        ("xyz", ": choose one of auto, messages, "),
        ("untrusted my_formats:pair", "a run's config.json must not name code to run: add data.format="),
    ],
)
def test_a_format_that_does_not_exist(path: Path, name: str, message: str) -> None:
    path.write_text(json.dumps(RECORD))
    with pytest.raises(UserError) as caught:
        list(read_file(path, DataConfig(format=name)))
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.format: ")


def test_functions_are_accepted_from_python_and_the_command_line_only(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        'from nanoft.config import Config\nconfig = Config().override({"data.format": "my_formats:pair"})\n'
    )
    assert load_config(tmp_path / "c.py", environment={}).data.format == "my_formats:pair"
    (tmp_path / "plain.yaml").write_text("model: {name: x}\n")
    found = load_config(tmp_path / "plain.yaml", ["data.format=my_formats:pair"], environment={})
    assert found.data.format == "my_formats:pair"
    (tmp_path / "c.yaml").write_text("data: {format: 'my_formats:pair'}\n")
    (tmp_path / "c.json").write_text(json.dumps({"data": {"format": "my_formats:pair"}}))
    for name in ("c.yaml", "c.json"):
        with pytest.raises(UserError, match=rf"{name}: data\.format: my_formats:pair: a data file must not name code"):
            load_config(tmp_path / name, environment={})


def test_a_runs_config_json_never_imports_its_function(tmp_path: Path) -> None:
    recorded = {"data": {"format": "my_formats:pair"}, "evaluation": {"metrics": ["a:b", "numeric"]}, "provenance": {}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    config = load_config(tmp_path / "config.json", environment={})
    assert config.evaluation.metrics == ("numeric",)
    with pytest.raises(UserError, match=r"add data\.format=my_formats:pair"):
        format_function(config.data.format)
    check_format(config.data.format)  # so that commands which read no data accept such a run
    given = load_config(tmp_path / "config.json", ["data.format=my_formats:pair"], environment={})
    check_format(given.data.format)
