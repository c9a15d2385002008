"""Which settings may change when a run is resumed, and why the others may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nanoft import UserError
from nanoft.config.settings import Config

# Fields and sections that may differ when a run is resumed, by reason: none of them changes a step that was taken.
MAY_CHANGE_ON_RESUME = {
    "where the run ends": "training.num_epochs training.max_steps training.early_stopping_patience "
    "training.early_stopping_threshold",
    "what is logged": "training.log_steps training.eval_steps system.profile system.debug logging evaluation",
    "which checkpoints are kept": "training.save_steps training.keep_checkpoints training.keep_every output.dir",
    "when activations and weights are computed, not their values": "training.checkpointing training.checkpoint_every "
    "quantization.dequantize",
    "where downloads are": "model.cache_dir",
    "where things are computed": "training.sharding system.device system.memory_gb model.base_device",
    "how the next faults are handled": "guard",
    "only their product matters": "training.micro_batch_size training.gradient_accumulation_steps system.ranks",
}
FREE = {name for names in MAY_CHANGE_ON_RESUME.values() for name in names.split()}
FIXED = {"evaluation.max_samples"}  # although its section may change: the best loss so far was measured on them
# Files may move: their contents are compared instead. Key in the provenance -> what it identifies, and its fields.
BY_CONTENT = {
    "data_sha256": ("data", ("data.train_file", "data.validation_file")),
    "data_files": ("data", ("data.train_file", "data.validation_file")),  # the number of files in each part
    "base_sha256": ("base model", ("model.name", "model.revision")),
    "start_sha256": ("adapter of lora.start_from", ("lora.start_from",)),
}
# A different number of threads is only a warning: sums in another order differ in their last bits.
MAY_DIFFER = {"system.threads", *(name for _, names in BY_CONTENT.values() for name in names)}
# Why the others may not change, by section.
WHY_FIXED = {
    "model": "the weights or their computation would differ",
    "lora": "the shape, scale or initialization of the adapter would differ",
    "quantization": "the adapter was trained on other base weights",
    "data": "the samples or their order would differ",
    "training": "the steps already taken would have been different",
    "evaluation": "the best loss so far was measured on other samples",
    "system": "data order, dropout or rounding would differ",
}


def resume_fields(config: Config) -> dict[str, Any]:
    """The fields that must not change when a run is resumed, by full name."""
    fixed = {n: value for n, value in config.flat().items() if n in FIXED or not {n, n.partition(".")[0]} & FREE}
    return {**fixed, "training.micro_batch_size x gradient_accumulation_steps": config.effective_batch_size()}


def resume_fingerprint(config: Config) -> str:
    """SHA-256 of the `resume_fields` that differ from the defaults, so that a field added later does not change it."""
    defaults = resume_fields(Config())
    chosen = {name: value for name, value in resume_fields(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def first_difference(old: Config, new: Config) -> str | None:
    """The first field that prevents resuming the run of `old` with `new`, and why; None if there is none."""
    before, after = resume_fields(old), resume_fields(new)
    for name, value in before.items():
        if value != after[name] and name not in MAY_DIFFER:
            return f"{name}: {value} -> {after[name]}; {WHY_FIXED[name.partition('.')[0]]}"
    return None


def recorded_settings(recorded: Mapping[str, Any]) -> Config:
    """The settings in a run's config.json."""
    return Config.from_dict({name: fields for name, fields in recorded.items() if name != "provenance"})


def check_same_run(recorded: dict[str, Any], config: Config, provenance: Mapping[str, Any], where: str) -> None:
    """Refuse to mix two runs in one directory; `recorded` is the config.json there."""
    before, known = recorded_settings(recorded), recorded.get("provenance", {})
    was, now = before.effective_batch_size(), config.effective_batch_size()
    if before.system.ranks != config.system.ranks and was != now:
        text = f"the effective batch size of this run is {was}, and {config.system.ranks} processes make it {now}"
        choose = "change training.micro_batch_size, gradient_accumulation_steps or the number of processes"
        raise UserError(f"torchrun: {text}: {choose}")
    fix = "choose another output.dir"
    if difference := first_difference(before, config):
        raise UserError(f"output.dir: {where}: holds another run ({difference}): {fix}, or restore the field")
    old, new = resume_fields(before), resume_fields(config)
    for key, (what, names) in BY_CONTENT.items():
        if known.get(key) != provenance.get(key):
            other = "".join(f" ({name}: {old[name]} -> {new[name]})" for name in names if old[name] != new[name])
            changed = f"the {what} changed since that run began{other}"
            raise UserError(f"output.dir: {where}: {changed}: {fix}, or restore it")
