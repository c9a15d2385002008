"""The result of a check, for preflight and the doctor: ok, warn or FAIL, what was found, and what to do about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "warn", "FAIL"]
COLORS = {"ok": "32", "warn": "33", "FAIL": "31"}  # ANSI: green, yellow, red
FORCEABLE = ("room", "stop", "bos", "targets", "prompt", "head", "disk")  # checks that --force may override


@dataclass(frozen=True)
class Check:
    """One line of a report; `fix` says what to do unless the outcome is ok."""

    name: str
    outcome: Outcome
    found: str
    fix: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome != "FAIL"

    def __str__(self) -> str:
        color = sys.stdout.isatty()
        outcome = f"\033[{COLORS[self.outcome]}m{self.outcome:4}\033[0m" if color else f"{self.outcome:4}"
        return f"{outcome} {self.name:13} {self.found}" + (f": {self.fix}" if self.fix else "")
