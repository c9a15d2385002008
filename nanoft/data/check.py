"""A check before training: one line, and one fix. Imports nothing, so that a command line can name the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoft import UserError

CHECKS = ("room", "stop", "bos", "targets", "prompt", "head", "disk")  # that --force accepts


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is as it should be, what was found, and what to do if not."""

    name: str
    passed: bool
    found: str
    fix: str = ""

    def line(self) -> str:
        return f"preflight {self.name:9} {'ok  ' if self.passed else 'FAIL'}  {self.found}" + (
            "" if self.passed else f": {self.fix} (or --force {self.name})"
        )


def require_passed(checks: Sequence[Check], forced: Sequence[str]) -> None:
    """Stop at a check that failed, unless it is forced by name.

    Raises:
        UserError: names the first check that failed, and its fix.
    """
    failed = [check for check in checks if not check.passed and check.name not in forced]
    if failed:
        first = failed[0]
        raise UserError(f"preflight: {first.name}: {first.found}: {first.fix} (or --force {first.name})")
