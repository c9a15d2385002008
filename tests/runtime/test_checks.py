"""Checks: what stops, and what is forced."""

from __future__ import annotations

import pytest

from nanoft import UserError
from nanoft.runtime.command import Check, require_passed


def test_what_fails_stops_unless_it_is_forced() -> None:
    checks = [
        Check.of("one", True, "fine"),
        Check.of("two", False, "wrong", "mend it"),
        Check.of("three", False, "bad", "or not"),
    ]
    with pytest.raises(UserError, match=r"^preflight: two: wrong: mend it \(or --force two\)$"):
        require_passed(checks, [])
    with pytest.raises(UserError, match=r"^preflight: three: bad"):
        require_passed(checks, ["two"])
    require_passed(checks, ["two", "three"])
    assert checks[0].preflight_line() == "preflight one       ok    fine"
    assert checks[1].preflight_line() == "preflight two       FAIL  wrong: mend it (or --force two)"
