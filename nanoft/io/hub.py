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
    """Download into this directory from now on; empty: where the Hub's client does (HF_HUB_CACHE, HF_HOME).

    A directory with `hub` in it is a home like ~/.cache/huggingface, whose cache is that.
    """
    home = os.path.expanduser(directory)
    cache = os.path.join(home, "hub")
    _cache.set((cache if os.path.isdir(cache) else home) or None)


def cache_directory() -> Path:
    from huggingface_hub import constants

    return Path(_cache.get() or constants.HF_HUB_CACHE)


def download(repository: str, **options: Any) -> Path:
    """The directory with a snapshot of a repository; raises what the Hub's client does, which is many types."""
    from huggingface_hub import snapshot_download

    bar: Any = Bar  # whose type the client narrows
    return Path(snapshot_download(repository, cache_dir=_cache.get(), tqdm_class=bar, **options))


def reason_of(error: Exception) -> str:
    """Why a download failed, in one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub is not reachable, and it is not in the cache"
    return one_line(error) or type(error).__name__
