"""Tests of nanoft/config/functions.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nanoft import UserError
from nanoft.config.functions import import_function, is_function, source_file


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mine:score", True), ("a.b:c_1", True), ("rouge_l", False), ("regex:a", False), ("1:a", False), ("a:1", False)],
)
def test_a_function_is_a_module_and_a_name(name: str, expected: bool) -> None:
    assert is_function(name) is expected


def test_it_is_imported_from_the_current_directory_which_stays_off_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_score.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    found = import_function("own_score:double", "evaluation.metrics", "(answer, reference)")
    assert found(21) == 42
    assert source_file(found) == tmp_path / "own_score.py"
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "data.format: no_such_module:f: ModuleNotFoundError"),
        ("math:no_such_name", "data.format: math:no_such_name: AttributeError"),
        ("math:pi", r"data.format: math:pi: not a function: define def pi\(record\)"),
    ],
)
def test_a_mistake_names_the_field_and_the_function(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_function(name, "data.format", "(record)")


def test_a_built_in_has_no_source() -> None:
    assert source_file(len) is None
