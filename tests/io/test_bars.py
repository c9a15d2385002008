"""Progress bars: shown on a terminal if something takes long, and nowhere else."""

from __future__ import annotations

import io
import sys
import time

import pytest

from nanoft.io.bars import Bar, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float, enabled: bool = True) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(Bar, "enabled", enabled)
    parts = [b"x" * 250_000] * 4

    def slowly(part: bytes) -> bytes:
        time.sleep(seconds)
        return part

    assert list(track(map(slowly, parts), "merging", "B", total=1_000_000, size=len)) == parts
    return stream.getvalue()


def test_a_bar_has_the_share_and_the_time_left_and_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown(monkeypatch, Terminal(), 0.4)
    assert "merging:  75%" in said
    assert "750k/1.00M" in said
    assert "<00:00," in said  # the time left
    assert said.endswith("\r")
    assert said.rstrip("\r").rpartition("\r")[2].strip() == ""  # the line has been cleared


def test_there_is_none_of_what_is_quick_in_a_file_or_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 0.0).strip() == ""
    assert shown(monkeypatch, io.StringIO(), 0.4) == ""
    assert shown(monkeypatch, Terminal(), 0.4, enabled=False) == ""
