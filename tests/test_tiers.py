"""Every module of the library has its tests, where a reader looks for them, and some of them are quick."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiers import mark_quick, rest_is_slow

TESTS = Path(__file__).parent
LIBRARY = TESTS.parent / "nanoft"
MODULES = [path.relative_to(LIBRARY) for path in sorted(LIBRARY.rglob("*.py")) if path.name != "__init__.py"]


def imported(path: Path) -> set[str]:
    """Dotted names of modules and of what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_tests_mirror_the_library(module: Path) -> None:
    """nanoft/data/cache.py is tested in tests/data/test_cache.py, or by another file there that imports it."""
    place = TESTS / module.parent
    name = ".".join(["nanoft", *module.with_suffix("").parts])
    own = place / f"test_{module.stem.strip('_')}.py"
    others = [path for path in place.glob("test_*.py") if name in imported(path)]
    assert own.is_file() or others, f"nanoft/{module} has no test: write {own.relative_to(TESTS.parent)}"


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
