"""TODO."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nanoft import UserError

# What is fetched from the Hub: data only, never code, never pickles. The pattern of the weights leaves out the second
# copy of them that some models carry as consolidated.safetensors.
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
]  # fmt: skip


def find_model(name: str, field: str = "model.name", files: Sequence[str] = (*HUB_FILES, *TOKENIZER_FILES)) -> Path:
    """A local directory, or a Hub name fetched into the Hub's cache.

    Args:
        field: where the name comes from, for the message.
        files: patterns of what is fetched.
    Raises:
        UserError: neither a directory nor a model on the Hub that can be had.
    """
    if not name:
        raise UserError(f"{field}: empty: give a directory in the Hugging Face layout or a Hub name")
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{field}: {name}: no such directory: give a model's directory or its name on the Hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, gated, bad name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {name}: no such directory, and not to be had from the Hub: {reason}") from None
