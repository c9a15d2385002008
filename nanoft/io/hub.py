"""Downloads from the Hugging Face Hub: models and data sets, into the cache that `model.cache_dir` names."""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nanoft.io.bars import Bar
from nanoft.io.untrusted import one_line

_cache: ContextVar[str | None] = ContextVar("hub_cache", default=None)  # None: the Hub client's own


def use_cache(directory: str) -> None:
    """Download into this directory from now on; empty: the default of the Hub's client (HF_HUB_CACHE, HF_HOME).

    A directory that contains `hub` is a home like ~/.cache/huggingface, and `hub` is its cache.
    """
    home = os.path.expanduser(directory)
    cache = os.path.join(home, "hub")
    _cache.set((cache if os.path.isdir(cache) else home) or None)


def cache_directory() -> Path:
    from huggingface_hub import constants

    return Path(_cache.get() or constants.HF_HUB_CACHE)


def download(repository: str, **options: Any) -> Path:
    """The directory with a snapshot of a repository; raises the errors of the Hub's client, which have many types."""
    from huggingface_hub import snapshot_download

    bar: Any = Bar  # the client declares a narrower type
    return Path(snapshot_download(repository, cache_dir=_cache.get(), tqdm_class=bar, **options))


def reason_of(error: Exception) -> str:
    """Why a download failed, in one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "not in the cache, and the Hub is not reachable"
    return one_line(error) or type(error).__name__
