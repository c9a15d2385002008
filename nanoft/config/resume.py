"""TODO."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nanoft import UserError
from nanoft.config.settings import Config

# What may differ when a run goes on: none of it changes what the steps already taken did.
MAY_CHANGE_ON_RESUME = {
    "training.num_epochs": "where the run ends",
    "training.max_steps": "where the run ends",
    "training.log_steps": "what is told",
    "training.eval_steps": "what is told",
    "training.save_steps": "what is kept",
    "training.keep_checkpoints": "what is kept",
    "training.keep_every": "what is kept",
    "training.early_stopping_patience": "where the run ends",
    "training.early_stopping_threshold": "where the run ends",
    "training.checkpointing": "when activations are computed, not which",
    "training.checkpoint_every": "when activations are computed, not which",
    "training.sharding": "where the weights lie",
    "quantization.dequantize": "when weights are unpacked, not to what",
    "system.device": "where it is computed",
    "system.memory_gb": "what a plan goes by",
    "system.profile": "what is told",
    "system.debug": "what is told",
    "output.dir": "where it lies",
    "guard": "what happens next time",
    "evaluation": "what is measured",
    "logging": "what is shown",
}
KEPT = {"evaluation.max_samples"}  # of what may change, this may not: the best loss so far is on those samples
# Why the others may not, by section.
WHY_NOT = {
    "model": "other weights, or computed otherwise",
    "lora": "the adapter would have another shape, scale or beginning",
    "quantization": "the adapter corrects another base",
    "data": "other samples, or in another order",
    "training": "the steps already taken would have been others",
    "evaluation": "the best loss so far was measured on other samples",
    "system": "order, dropout or rounding would be others",
}
SPLIT = (  # only their product counts
    "training.micro_batch_size",
    "training.gradient_accumulation_steps",
    "system.ranks",
)


def resume_fields(config: Config) -> dict[str, Any]:
    """Every field that must stay as it is when a run goes on, by its full name."""
    fields = {f"{section}.{name}": value for section, fs in config.to_dict().items() for name, value in fs.items()}
    free = {*MAY_CHANGE_ON_RESUME, *SPLIT}
    kept = {n: value for n, value in fields.items() if n in KEPT or not {n, n.partition(".")[0]} & free}
    return {**kept, "training.micro_batch_size x gradient_accumulation_steps": config.effective_batch_size()}


def resume_fingerprint(config: Config) -> str:
    """SHA-256 of what `settled` has beyond the defaults: checkpoints of the same run have the same.

    A field that a later version brings does not change it.
    """
    usual = resume_fields(Config())
    chosen = {name: value for name, value in resume_fields(config).items() if value != usual[name]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def first_difference(old: Config, new: Config) -> str | None:
    """The first field that forbids going on with `old`'s run under `new`, and why; None if all fit."""
    before, after = resume_fields(old), resume_fields(new)
    for name, value in before.items():
        if value != after[name]:
            return f"{name}: {value} -> {after[name]}; {WHY_NOT[name.partition('.')[0]]}"
    return None


def check_same_run(recorded: dict[str, Any], config: Config, provenance: Mapping[str, Any], where: str) -> None:
    """Refuse to mix two runs in one directory.

    Args:
        recorded: the directory's config.json.
        provenance: of the run that is to start: hashes of its data and base model.
    Raises:
        UserError: names the first thing that differs.
    """
    before = Config.from_dict({name: fields for name, fields in recorded.items() if name != "provenance"})
    if before.system.ranks != config.system.ranks:
        check_ranks(before.effective_batch_size(), config)
    difference = first_difference(before, config)
    fix = "choose another output.dir"
    if difference:
        raise UserError(f"output.dir: {where}: holds another run ({difference}): {fix}, or set the field back")
    for key, what in (("data_sha256", "data"), ("base_sha256", "base model")):
        if recorded.get("provenance", {}).get(key) != provenance[key]:
            raise UserError(f"output.dir: {where}: the {what} changed since that run began: {fix}, or put it back")


def check_ranks(rows: int, config: Config) -> None:
    """A run goes on with another number of processes if a step has as many rows as before.

    Raises:
        UserError: it has not; how to split them.
    """
    size, ranks = config.micro_batch_rows(), config.system.ranks
    if config.effective_batch_size() != rows:
        fitting = next(size for size in range(min(size, rows), 0, -1) if rows % (size * ranks) == 0 or size == 1)
        steps, left = divmod(rows, fitting * ranks)
        fix = f"set training.micro_batch_size={fitting} training.gradient_accumulation_steps={steps}"
        raise UserError(
            f"torchrun: a step of this run has {rows} rows, and {ranks} processes with {size} x "
            f"{config.training.gradient_accumulation_steps} would take {config.effective_batch_size()}: "
            + ("start as many processes as divide them" if left else fix)
        )
