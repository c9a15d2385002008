"""Finding a model: a local directory, or a name on the Hugging Face Hub, whose files are downloaded into its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nanoft import UserError

# Files that are downloaded: data, never code or pickles. The pattern of the weights excludes the second copy that some
# models have as consolidated.safetensors.
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
]  # fmt: skip


def find_model(name: str, field: str = "model.name", files: Sequence[str] = (*HUB_FILES, *TOKENIZER_FILES)) -> Path:
    """The directory of a model, which is downloaded if it is not local.

    Args:
        name: a directory or a Hub name.
        field: where the name comes from, for error messages.
        files: patterns of the files to download.
    Raises:
        UserError: no such directory, and the download failed.
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
        raise UserError(
            f"{field}: {name}: no such directory, and could not be downloaded from the Hub: {reason}"
        ) from None
