"""Three tiers: `pytest -m quick` in about 90 seconds, `pytest` in minutes, `pytest -m slow` for all the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_is_slow(values: Iterable[Any], *kept: Any) -> list[Any]:
    """For `parametrize`: the kept values run by default, the others with `-m slow`. A tuple is several arguments."""
    every = list(values)
    assert all(value in every for value in kept), f"{kept} are not all in {every}"
    parts = [value if isinstance(value, tuple) else (value,) for value in every]
    marks = [() if value in kept else pytest.mark.slow for value in every]
    return [pytest.param(*part, marks=mark) for part, mark in zip(parts, marks, strict=True)]


def mark_quick(items: Iterable[pytest.Item]) -> None:
    """Marks as `quick` one case of each of a file's first four tests that are not slow, unless the file marks some.

    The whole runs of tests/faults are no test of one module, and never quick.
    """
    files: dict[Any, dict[str, pytest.Item]] = {}
    marked = {item.path for item in items if item.get_closest_marker("quick")}
    for item in items:
        if item.path not in marked and item.path.parent.name != "faults" and not item.get_closest_marker("slow"):
            files.setdefault(item.path, {}).setdefault(item.name.split("[")[0], item)
    for tests in files.values():
        for item in list(tests.values())[:4]:
            item.add_marker("quick")
