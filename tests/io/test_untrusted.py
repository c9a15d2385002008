"""Bounded readers: ordinary input passes unchanged, input at a bound passes, input beyond it is refused."""

from __future__ import annotations

import codecs
import json
import math
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


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ('{"a": 1,\n"a": 2}', "a", (1, 2)),
        ('{"b":\n[{"a": {"a": "a\\": {"}},\n\n{"a": 1, "c": [],\n"a": 1}]}', "a", (4, 5)),
        ('{"a": 1, "\\u0061":\n 2}', "a", (1, 1)),  # the same name, spelled in two ways
        ("a: 1\nb: {a: 1}\n'a': 2\n", "a", (1, 3)),
        ("x:\n- {b: 1,\n   b: 2}\n", "b", (2, 3)),
    ],
)
def test_a_name_twice_is_refused_with_both_lines(text: str, name: str, lines: tuple[int, int]) -> None:
    parse = parse_yaml if text[0] != "{" else lambda json_text: parse_json(json_text.encode())
    with pytest.raises(ValueError, match=f"line {lines[1]}: '{name}' appears a second time, after line {lines[0]}:"):
        parse(text)


@pytest.mark.parametrize("text", ["yes", "Off", "1:30", "1:30.5", "010", "0b11", "1_000", "2001-12-14", "2001-13-40"])
def test_what_yaml_1_1_reads_in_its_own_way_is_refused(text: str) -> None:
    for document in (f"a: 1\nb: {text}\n", f"a: 1\nb: [{text}]\n", f"a: 1\n{text}: b\n"):
        with pytest.raises(ValueError, match=f"^line 2: {re.escape(text)} has different meanings .*: quote it"):
            parse_yaml(document)
    assert parse_yaml(f"b: '{text}'") == {"b": text}


def test_aliases_are_refused_with_their_line() -> None:
    """They cannot expand a short text until memory is full, or make a value contain itself."""
    for text in ("a: &a [1]\nb: *a\n", "a: &a\n  - *a\n", "a: &a {k: 1}\nc: {<<: *a, k: 5}\n", "&k a: 1\n*k : 2\n"):
        with pytest.raises(ValueError, match=r"^line 2: \*[ak]: aliases are not supported: write the value again"):
            parse_yaml(text)


def test_numbers_and_words_that_both_versions_read_alike() -> None:
    text = "[0, -7, 0x1f, 1.5, -.5, 1e-4, 2.E+3, .inf, true, FALSE, null, ~, y, n, 08, 1.2.3, 1e]"
    numbers = [0, -7, 31, 1.5, -0.5, 1e-4, 2000.0, math.inf]
    assert parse_yaml(text) == [*numbers, True, False, None, None, "y", "n", "08", "1.2.3", "1e"]


def test_a_byte_order_mark_is_no_text() -> None:
    assert parse_json(codecs.BOM_UTF8 + b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="UTF-16: save it as UTF-8"):
        parse_json('{"a": 1}'.encode("utf-16"))


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: x}\nlora:\n  rank: 4\n  target_modules: [q_proj, v_proj]\n",
        "a: '2001-12-14'\nb: 0x1f\nc: 1000\nd: .inf\ne: ~\nf: |\n  two\n  lines\n",
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
    with pytest.raises(ValueError, match="nested too deeply"):
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
