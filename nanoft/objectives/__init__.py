"""Objectives: what training minimizes. A new one is a file here, an entry in OBJECTIVES, and a record format."""

from __future__ import annotations

from typing import Any

from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.objectives.balance import BalancedSFT
from nanoft.objectives.distill import Distill
from nanoft.objectives.grpo import GRPO
from nanoft.objectives.kto import KTO
from nanoft.objectives.objective import Objective
from nanoft.objectives.preference import DPO, ORPO, SimPO
from nanoft.objectives.reward import RewardModel
from nanoft.objectives.rollouts import Prompts
from nanoft.objectives.sft import SFT

# Each is built from the config and the adapters by name (empty in full training) and, if it samples, from the prompts.
OBJECTIVES: dict[str, Any] = {
    "sft": SFT, "dpo": DPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO, "reward": RewardModel, "grpo": GRPO,
    "distill": Distill,
}  # fmt: skip


def trains_score(config: Config) -> bool:
    """Whether the trained model has a scalar head instead of one for logits."""
    return issubclass(OBJECTIVES[config.training.objective], RewardModel)


def build_objective(config: Config, adapters: dict[str, Adapter], *data: Any) -> Objective:
    """The objective that `training.objective` names; `data`: records and tokenizer, for those that sample."""
    kind: Any = BalancedSFT if config.training.balance_loss else OBJECTIVES[config.training.objective]
    prompts = [Prompts(config, *data)] if kind.learns == "prompts" else []
    objective: Objective = kind(config, adapters, *prompts)
    return objective
