"""Validate names in a config that refer to entries of tables; an unknown name is refused with the nearest known one.

nanoft/config/ checks types and ranges but knows no tables: a new optimizer, schedule, record shape or metric is one
entry next to its mathematics. All three scripts call `validate_config` right after a config is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch

from nanoft import UserError
from nanoft.config import Config, TrainingConfig
from nanoft.config.fields import nearest
from nanoft.data.formats import check_format
from nanoft.lora import VARIANTS, variant_of
from nanoft.metrics.answers import select_metrics
from nanoft.objectives import OBJECTIVES, trains_score
from nanoft.optim import OPTIMIZERS, SCHEDULES, warmup_steps
from nanoft.tracking.trackers import chosen_trackers

MAX_RANK = 4096  # of LoRAConfig.rank


def validate_config(config: Config) -> None:
    """Check the names of table entries, and the constraints of these entries on other settings."""
    t = config.training
    names: dict[str, tuple[str, Iterable[str]]] = {
        "training.objective": (t.objective, OBJECTIVES),
        "training.optimizer": (t.optimizer, OPTIMIZERS),
        "training.lr_scheduler": (t.lr_scheduler, SCHEDULES),
        "lora.init": (config.lora.init, dict.fromkeys(init for init, _ in VARIANTS)),
    }
    for field, (name, known) in names.items():
        if name not in known:
            raise UserError(f"{field}: {name!r:.60} is not known{nearest(name, list(known))}")
    if (config.lora.init, config.lora.dora) not in VARIANTS:
        raise UserError(f"lora.dora: {config.lora.dora} is not supported with lora.init={config.lora.init}: change one")
    if t.method == "lora":
        check_variant(config)
    check_schedule(t, t.max_steps)
    check_objective(config)
    check_format(config.data.format, OBJECTIVES[t.objective].learns)
    select_metrics(config.evaluation.metrics)
    chosen_trackers(config.logging.report_to)
    if t.sharding == "full" and not OPTIMIZERS[t.optimizer].shardable:
        fix = "set training.optimizer=adamw (each of N processes holds an Nth of it) or training.sharding=none"
        raise UserError(f"training.optimizer: the state of {t.optimizer} cannot be sharded: {fix}")
    if t.sharding == "full" and config.quantization.bits < 16 and torch.__version__ < "2.12":  # its FSDP2: no integers
        fix = f"this is {torch.__version__}: install it, or set training.sharding=none"
        raise UserError(f"training.sharding: full: of a quantized base needs PyTorch 2.12 or later, {fix}")


def check_objective(config: Config) -> None:
    """Refuse settings of `preference` and `rl`, and those of supervised training, that the objective does not read."""
    t, p, objective = config.training, config.preference, OBJECTIVES[config.training.objective]
    sections: dict[str, Any] = {"preference": p, "rl": config.rl, "distill": config.distill}
    read = {(objective.section, name) for name in objective.settings}
    unread = [(name, f) for name, section in sections.items() for f in fields(section) if (name, f.name) not in read]
    idle = [f"{name}.{f.name}" for name, f in unread if getattr(sections[name], f.name) != f.default]
    if "label_smoothing" in objective.settings and p.loss == "ipo" and p.label_smoothing:
        idle.append("preference.label_smoothing")
    if config.data.margin_field and not trains_score(config):
        idle.append("data.margin_field")
    if trains_score(config) and "lm_head" in (*config.lora.target_modules, *config.lora.modules_to_save):
        raise UserError("lora: lm_head: training.objective=reward replaces it by a scalar head: remove it")
    terms = "label_smoothing", "z_loss", "balance_loss", "neftune_alpha"
    supervised = {f"training.{name}": getattr(t, name) for name in terms}
    supervised["data.train_on"] = config.data.train_on != "assistant"
    label = config.data.label_field
    supervised["data.label_field"] = label == "ignore" or (label is not None and objective.learns == "pairs")
    idle += [name for name, is_set in supervised.items() if is_set and objective.learns != "turns"]
    if idle:
        loss = f" and preference.loss={p.loss}" if "loss" in objective.settings else ""
        raise UserError(f"{idle[0]}: has no effect with training.objective={t.objective}{loss}: remove it")


def check_schedule(t: TrainingConfig, total_steps: int | None) -> None:
    if t.long_warmup == "refuse" and total_steps and warmup_steps(total_steps, t) > total_steps:
        run = f"the run has {total_steps:,} steps and would never reach training.learning_rate"
        raise UserError(f"training.warmup_steps: {t.warmup_steps}: {run}: lower it, or set warmup_ratio instead")


def check_variant(config: Config) -> None:
    """Refuse settings that have no effect on this variant of LoRA, or that its files cannot store."""
    lora, variant = config.lora, variant_of(config.lora)
    without_effect = {
        "lora.freeze_a": lora.freeze_a and "lora_A" not in variant.TRAINED,
        "training.lora_plus_ratio": config.training.lora_plus_ratio != 1 and "lora_B" not in variant.TRAINED,
    }
    if field := next((field for field, is_set in without_effect.items() if is_set), None):
        raise UserError(f"{field}: has no effect with lora.init={lora.init}: remove it")
    most = MAX_RANK // variant.RANKS
    if (rank := max([lora.rank, *lora.rank_pattern.values()])) > most:
        times = f"{lora.init} is saved as LoRA with {variant.RANKS} times the rank"
        raise UserError(f"lora.rank: {rank}: {times}: set lora.rank to {most} or less")
