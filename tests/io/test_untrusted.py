"""Bounded readers: what is ordinary passes unchanged, what is at a bound passes, what is beyond it does not."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import TOKEN

from nanoft import UserError
from nanoft.io.untrusted import (
    MAX_DEPTH,
    MAX_YAML,
    one_line,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    redact,
    resolve_file,
    time_limit,
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_at_the_bound() -> None:
    assert repr(parse_json(nested(MAX_DEPTH).encode())) == nested(MAX_DEPTH)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(nested(MAX_DEPTH + 1).encode())
    for value in (3, "text", None, [1, {"a": [True]}], {"a": 1.5}):
        assert parse_json(json.dumps(value).encode()) == value


def test_a_name_twice_is_refused_where_it_matters() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="'a' appears twice"):
        parse_json(b'{"b": {"a": 1, "a": 1}}', unique=True)


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: x}\nlora:\n  rank: 4\n  target_modules: [q_proj, v_proj]\n",
        "a: &a {k: 1, l: [2, 3]}\nb: *a\nc: {<<: *a, k: 5}\n",
        "a: 2001-12-14\nb: 0x1f\nc: 1_000\nd: .inf\ne: ~\nf: |\n  two\n  lines\n",
        "",
        nested(MAX_DEPTH),
    ],
)
def test_yaml_is_pyyamls(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


def test_yaml_at_the_bound() -> None:
    assert parse_yaml("a: " + "x" * (MAX_YAML - 3)) == {"a": "x" * (MAX_YAML - 3)}
    with pytest.raises(ValueError, match="longer than"):
        parse_yaml("a: " + "x" * (MAX_YAML - 2))
    with pytest.raises(ValueError, match="nested more than"):
        parse_yaml(nested(MAX_DEPTH + 1))


def test_files_that_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    assert read_bytes(path, 10) == bytes(10)
    with pytest.raises(UserError, match="larger than 9 bytes"):
        read_bytes(path, 9)


def test_links_within_the_directory_and_configs_anywhere(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to("real.json")
    assert resolve_file(tmp_path / "link.json") == (tmp_path / "real.json").resolve()
    assert read_json(tmp_path / "link.json") == {"a": 1}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link.json").symlink_to(tmp_path / "real.json")
    assert read_bytes(tmp_path / "home" / "link.json", confined=False) == b'{"a": 1}'  # a user's own config
    with pytest.raises(UserError, match="leads out of its directory"):
        read_json(tmp_path / "home" / "link.json")
    (tmp_path / "other").symlink_to(tmp_path)  # of the directory itself anything may be said
    assert read_json(tmp_path / "other" / "real.json") == {"a": 1}


def test_an_expression_that_never_ends_is_ended() -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=r"the field: takes longer than 0\.2 seconds"), time_limit(0.2, "the field"):
        re.fullmatch("(.+)+!", "a" * 60)
    assert time.process_time() - started < 5
    with time_limit(0.01, "quick"):
        pass
    time.sleep(0.05)  # and nothing comes after the block


def test_without_signals_there_is_no_limit() -> None:
    done: list[Any] = []

    def work() -> None:
        with time_limit(0.01, "in a thread"):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (f"model {TOKEN} is gated", "model *** is gated"),
        (f"https://me:{TOKEN}@huggingface.co/x/y", "https://***@huggingface.co/x/y"),
        ("https://me:password@x.org/a", "https://***@x.org/a"),
        ("https://x.org/a?token=abcdef&b=1", "https://x.org/a?token=***&b=1"),
        ("key wandb_v1_abcdefghijklmnopqrstuvwxyz", "key ***"),
        ("kept: hf_mistral, hf://datasets/a/b, https://x.org:8080/a@b, a@b.c", None),
        ("kept: hf_tiny_model_with_a_long_name_of_many_words", None),
        ("the-value-of-the-variable", "***"),
    ],
)
def test_tokens_are_taken_out(text: str, redacted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-value-of-the-variable")
    monkeypatch.setenv("WANDB_API_KEY", "kept")  # too short to be one
    assert redact(text) == (text if redacted is None else redacted)


def test_one_line_is_one_line() -> None:
    assert one_line("a\n b\t\x1b[31mc\x07 é 日本 \ud800") == "a b \\x1b[31mc\\x07 é 日本 \\ud800"
    assert len(one_line("x" * 10_000)) < 2100
