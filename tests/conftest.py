"""Fixtures: small models and data that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import os

import pytest

# One thread, here and in every process that a test starts: two processes with two threads each on two cores wait for
# one another most of the time. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _no_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NANOFT_")]:
        monkeypatch.delenv(name)
