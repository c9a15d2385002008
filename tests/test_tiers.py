"""Every module of the library has tests in the file that mirrors it, and some of them are quick."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiers import mark_quick, rest_is_slow

TESTS = Path(__file__).parent
LIBRARY = TESTS.parent / "nanoft"
MODULES = [path.relative_to(LIBRARY) for path in sorted(LIBRARY.rglob("*.py")) if path.name != "__init__.py"]


def taken_from(name: str, paths: Iterable[Path]) -> bool:
    """Whether one of the files imports the module or runs it by name."""
    package, _, last = name.rpartition(".")
    taken = re.compile(rf"\b{re.escape(name)}\b|from {re.escape(package)} import \(?[^)\n]*\b{last}\b")
    return any(taken.search(path.read_text(encoding="utf-8")) for path in paths)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_tests_mirror_the_library(module: Path) -> None:
    """nanoft/data/filters.py is tested in tests/data/test_filters.py, whose first tests are quick.

    A module may instead be tested by its name in another file, an old spelling in tests/runtime/test_commands.py.
    """
    own = TESTS / module.parent / f"test_{module.stem.strip('_')}.py"
    name = ".".join(["nanoft", *module.with_suffix("").parts]).removesuffix(".__main__")
    tested = own.is_file() or taken_from(name, TESTS.rglob("test_*.py"))
    old_spelling = "renamed(" in (LIBRARY / module).read_text(encoding="utf-8")
    assert tested or old_spelling, f"nanoft/{module} has no test: write {own.relative_to(TESTS.parent)}"


class Item:
    def __init__(self, file: str, name: str, *marks: str) -> None:
        self.path, self.name, self.marks = Path(file), name, set(marks)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, name: str) -> None:
        self.marks.add(name)


def test_the_first_of_each_file_are_quick() -> None:
    items = [Item("a.py", "x[1]"), Item("a.py", "x[2]"), Item("a.py", "y", "slow"), Item("a.py", "z")]
    items += [Item("b.py", "u"), Item("b.py", "v", "quick"), Item("faults/c.py", "w")]
    items += [Item("d.py", name) for name in "abcde"]
    mark_quick(items)  # type: ignore[arg-type]
    assert [item.name for item in items if "quick" in item.marks] == ["x[1]", "z", "v", *"abcd"]


def test_the_rest_is_slow() -> None:
    found = [(part.values, [mark.name for mark in part.marks]) for part in rest_is_slow([1, (2, 3)], 1)]
    assert found == [((1,), []), ((2, 3), ["slow"])]
