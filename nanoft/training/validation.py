"""Names in a config that stand for entries of tables: known ones pass, others are refused with the nearest known name.

nanoft/config/ checks types and ranges, and knows no table: a new optimizer, schedule, record shape or metric is one
entry beside its mathematics. All three commands call `validate_config` right after a config is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.fields import nearest
from nanoft.data.formats import check_format
from nanoft.lora import VARIANTS
from nanoft.metrics.answers import select_metrics
from nanoft.objectives import OBJECTIVES
from nanoft.optim import OPTIMIZERS, SCHEDULES


def validate_config(config: Config, origin: Mapping[str, str] | None = None) -> None:
    """Check the names of table entries, and what the tables say about other settings; a mistake is a UserError.

    Args:
        origin: section.field -> its name in the user's file, where that is another.
    """
    t = config.training
    names: dict[str, tuple[str, Iterable[str]]] = {
        "training.objective": (t.objective, OBJECTIVES),
        "training.optimizer": (t.optimizer, OPTIMIZERS),
        "training.lr_scheduler": (t.lr_scheduler, SCHEDULES),
        "lora.init": (config.lora.init, dict.fromkeys(init for init, _ in VARIANTS)),
    }
    for field, (name, known) in names.items():
        if name not in known:
            place = f"{origin[field]}: {field}" if origin and field in origin else field
            raise UserError(f"{place}: {name!r:.60} is not known{nearest(name, list(known))}")
    if (config.lora.init, config.lora.dora) not in VARIANTS:
        raise UserError(f"lora.dora: {config.lora.dora} is not supported with lora.init={config.lora.init}: change one")
    t.check_schedule(t.max_steps)
    check_format(config.data.format)
    select_metrics(config.evaluation.metrics)
    if t.sharding == "full" and not OPTIMIZERS[t.optimizer].shardable:
        raise UserError(
            f"training.optimizer: the state of {t.optimizer} cannot be sharded: set training.optimizer=adamw "
            "(each of N processes holds an Nth of it) or training.sharding=none"
        )
