"""The result of a check, for preflight and the doctor; imports no torch, so that a command line can name the checks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanoft import UserError

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

    @classmethod
    def of(cls, name: str, passed: bool, found: str, fix: str = "") -> Check:
        return cls(name, "ok" if passed else "FAIL", found, fix)

    @property
    def passed(self) -> bool:
        return self.outcome != "FAIL"

    def __str__(self) -> str:
        color = sys.stdout.isatty()
        outcome = f"\033[{COLORS[self.outcome]}m{self.outcome:4}\033[0m" if color else f"{self.outcome:4}"
        return f"{outcome} {self.name:13} {self.found}" + (f": {self.fix}" if self.fix else "")

    def preflight_line(self) -> str:
        """The same for `train.py`, which can be told to go on."""
        fix = "" if self.passed else f": {self.fix} (or --force {self.name})"
        return f"preflight {self.name:9} {self.outcome:4}  {self.found}{fix}"


def require_passed(checks: Sequence[Check], forced: Sequence[str]) -> None:
    """Stop at the first check that failed, unless it is forced by name."""
    for check in checks:
        if not check.passed and check.name not in forced:
            raise UserError(f"preflight: {check.name}: {check.found}: {check.fix} (or --force {check.name})")
