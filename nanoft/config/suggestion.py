"""Which setting is meant by a name that is not written section.field: `lr`, `max-steps`, `training.learning_rate`."""

from __future__ import annotations

import difflib

from nanoft.config.aliases import ALIASES
from nanoft.config.settings import Config

SHORT = {"lr": "training.learning_rate", "epochs": "training.num_epochs", "batch_size": "training.micro_batch_size"}


def suggest_override(name: str) -> str | None:
    """The section.field that `name` most likely means; None if nothing is near."""
    name = name.replace("-", "_")
    fields = {f"{section}.{field}": field for section, part in Config().to_dict().items() for field in part}
    meanings = {alias: known.field for alias, known in ALIASES.items() if known.field} | SHORT
    meanings |= {field: path for path, field in reversed(fields.items())} | {path: path for path in fields}
    nearest = difflib.get_close_matches(name, meanings, n=1, cutoff=0.75)
    return meanings[nearest[0]] if nearest else None
