"""Fixtures: small models and data that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("NANOFT_")]:
        monkeypatch.delenv(name)
