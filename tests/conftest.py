"""Fixtures: small models and data that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import http.server
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import settings
from tiers import mark_quick

from nanoft.io.hub import use_cache

# One thread, here and in every process that a test starts: two processes with two threads each on two cores wait for
# one another most of the time. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

# Settings of whoever runs the tests: before any fixture, and for the processes that tests start.
for variable in [name for name in os.environ if name.startswith("NANOFT_")]:
    del os.environ[variable]

# Signals as a terminal has them: a shell's background jobs (and nohup) have SIGINT and SIGHUP ignored, and so would
# every process that a test starts.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# The same examples every time; pytest --hypothesis-profile=default draws new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", type=Path, help="write the largest differences of each family to this file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if path := config.getoption("--differences"):
        from differences import table

        path.write_text(table(terminalreporter.stats.get("passed", [])))


@pytest.fixture
def differs(record_property: Callable[[str, object], None]) -> Callable[[str, Any, float], None]:
    """Asserts that a difference is below a limit; its name is one of differences.CHECKS."""

    def check(name: str, found: Any, allowed: float) -> None:
        record_property(name, float(found.detach() if hasattr(found, "detach") else found))
        assert found < allowed

    return check


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_quick(items)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenized data is cached in a directory that pytest cleans up."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, and three finished runs on them: lora, qlora (computed in bfloat16) and full."""
    from tiny_models import make_chat_model, train_run, write_records

    root = tmp_path_factory.mktemp("runs")
    make_chat_model(root / "base")
    records = write_records(root / "data.jsonl")
    train_run(root / "lora", root / "base", records)
    train_run(root / "qlora", root / "base", records, quantization__bits=4, model__dtype="bfloat16")
    train_run(root / "full", root / "base", records, training__method="full", training__learning_rate=1e-3)
    return root


@pytest.fixture
def serve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Replaces the Hub with a handler of HTTP requests, and starts with an empty cache."""
    servers: list[http.server.ThreadingHTTPServer] = []
    use_cache("")  # not what another test's config said

    def serve(handler: Any) -> None:
        constants = huggingface_hub.constants
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[0].serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{servers[0].server_address[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)

    yield serve
    for server in servers:
        server.shutdown()  # ends its thread, too
        server.server_close()
