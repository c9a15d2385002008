"""Downloads from the Hugging Face Hub: models and data sets, into the cache that `model.cache_dir` names."""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nanoft import UserError
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


def download(repository: str, where: str, **options: Any) -> Path:
    """The directory with a snapshot of a repository; `where` begins the message of a UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    bar: Any = Bar  # the client declares a narrower type
    try:
        return Path(snapshot_download(repository, cache_dir=_cache.get(), tqdm_class=bar, **options))
    except Exception as error:  # of many types: no network, no such repository, gated, bad name
        reason = one_line(error) or type(error).__name__
        if isinstance(error, LocalEntryNotFoundError):
            reason = "not in the cache, and the Hub is not reachable"
        if isinstance(error, GatedRepoError):
            page = "datasets/" * (options.get("repo_type") == "dataset") + repository
            reason = f"accept its terms at https://huggingface.co/{page}, then set HF_TOKEN: {reason}"
        raise UserError(f"{where} could not be downloaded from the Hub: {reason}") from None
