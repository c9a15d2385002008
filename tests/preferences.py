"""Data for tests of preference objectives: random samples, and a file of pairs."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from runs import record

from nanoft.batches import Sample, TokenDataset
from nanoft.config import TrainingConfig
from nanoft.data.formats import Learns
from nanoft.objectives import OBJECTIVES
from tiny_models import make_chat_model

VOCAB = 32
BEYOND_SFT = [name for name in OBJECTIVES if name != "sft"]
ON_PREFERENCES = [name for name, objective in OBJECTIVES.items() if objective.learns in ("pairs", "labels")]


SAMPLING = {  # a short run that samples; a random model's answers differ in this
    "rl__reward": "regex:[a-mA-M]",
    "rl__prompts": 2,
    "rl__group_size": 4,
    "rl__max_new_tokens": 8,
    "training__gradient_accumulation_steps": TrainingConfig.gradient_accumulation_steps,
}


@functools.cache
def teacher() -> str:
    """A model with the vocabulary of other tests' models."""
    directory = tempfile.mkdtemp()
    make_chat_model(Path(directory), seed=7)
    return directory


def settings_of_run(objective: str) -> dict[str, Any]:
    """What a run needs besides the data of `write_pairs`."""
    if OBJECTIVES[objective].section == "distill":
        return {"distill__teacher": teacher(), "distill__teacher_bits": 16, "distill__max_new_tokens": 8}
    return SAMPLING if OBJECTIVES[objective].section == "rl" else {}


def random_samples(learns: Learns, units: int = 6) -> TokenDataset:
    """Prompts and answers of different lengths; both answers of a pair have the same prompt, labels are mixed."""
    chance, made = np.random.default_rng(0), list[Sample]()
    for unit in range(units):
        prompt = chance.integers(1, VOCAB, chance.integers(2, 6), np.int32)
        for _ in range(2 if learns == "pairs" else 1):
            answer = chance.integers(1, VOCAB, chance.integers(1, 8), np.int32)
            is_target = np.arange(len(prompt) + len(answer)) >= len(prompt)
            made.append(Sample(np.concatenate([prompt, answer]), is_target, unit, label=float(unit % 3 != 1)))
    return TokenDataset.of(made, 2 if learns == "pairs" else 1)


def write_pairs(path: Path, count: int = 40) -> Path:
    """Questions with two answers each, of different lengths."""
    lines = [
        record(
            prompt=f"Say {n} {'and again ' * (n % 4)}please.",
            chosen=f"{n}, {n + 1}" + "!" * (n % 3),
            rejected=f"{n}." + "?" * (n % 5),
        )
        for n in range(count)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path
