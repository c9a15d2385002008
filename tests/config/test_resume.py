"""Tests of nanoft/config/resume.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanoft import UserError
from nanoft.config import (
    Config,
    OutputConfig,
    SystemConfig,
)
from nanoft.config.resume import check_same_run, first_difference


def refused(action: Callable[[], Any], *parts: str) -> None:
    """The action raises a UserError of one line that contains every part."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


# --- going on with a run


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("training.learning_rate", 1e-3, "training.learning_rate: 0.0002 -> 0.001"),
        ("system.seed", 1, "system.seed: 0 -> 1"),
        ("lora.target_modules", ("q_proj",), "lora.target_modules"),
        ("training.optimizer", "sgd", "training.optimizer: adamw -> sgd"),
        ("training.momentum", 0.5, "training.momentum: 0.9 -> 0.5"),
        ("training.lora_plus_ratio", 16.0, "training.lora_plus_ratio: 1.0 -> 16.0"),
        ("training.lr_power", 2.0, "training.lr_power: 1.0 -> 2.0"),
        ("training.max_steps", 9, None),
        ("training.num_epochs", 9, None),
        ("quantization.dequantize", "cached", None),
        ("training.save_steps", 9, None),
        ("output.dir", "elsewhere", None),
        ("evaluation.prompts", 9, None),
        ("evaluation.max_samples", 9, "evaluation.max_samples: None -> 9; the best loss so far"),
        ("logging.progress_bar", False, None),
        ("model.name", "moved", None),  # its content is compared instead
        ("data.train_file", "moved", None),
        ("system.threads", 2, None),  # which is a warning
    ],
)
def test_only_what_leaves_the_steps_taken_as_they_are_may_change(key: str, value: Any, difference: str | None) -> None:
    found = first_difference(Config(), Config().override({key: value}))
    assert found is None if difference is None else found is not None and found.startswith(difference)


def test_another_run_is_refused_by_its_first_difference() -> None:
    config, provenance = Config(output=OutputConfig(dir="d")), {"data_sha256": "1", "base_sha256": "2"}
    recorded = {**config.to_dict(), "provenance": {**provenance, "versions": {"torch": "1"}}}
    check_same_run(recorded, config, {**provenance, "versions": {"torch": "2"}}, "d")  # raises nothing
    other = Config(system=SystemConfig(seed=3), output=OutputConfig(dir="d"))
    refused(lambda: check_same_run(recorded, other, provenance, "d"), "output.dir: d: ", "system.seed: 0 -> 3")
    for key, what in (("data_sha256", "the data changed"), ("base_sha256", "the base model changed")):
        refused(lambda key=key: check_same_run(recorded, config, {**provenance, key: "9"}, "d"), what)
    refused(lambda: check_same_run(config.to_dict(), config, provenance, "d"), "the data changed")
    moved = config.override({"data.train_file": "b.jsonl"})
    check_same_run(recorded, moved, provenance, "d")
    changed = {**provenance, "data_sha256": "9"}
    refused(lambda: check_same_run(recorded, moved, changed, "d"), "the data changed", "data.train_file:  -> b.jsonl")
    parts = {**recorded, "provenance": {**provenance, "data_files": [2, 1]}}  # the same files, split in another way
    refused(lambda: check_same_run(parts, config, {**provenance, "data_files": [1, 2]}, "d"), "the data changed")


def test_a_base_that_moved_goes_on_if_it_is_the_same() -> None:
    config, provenance = Config(), {"data_sha256": "1", "base_sha256": "2"}
    recorded = {**config.to_dict(), "provenance": provenance}
    moved = config.override({"model.name": "elsewhere", "model.revision": "v2"})
    check_same_run(recorded, moved, provenance, "d")  # raises nothing
    refused(lambda: check_same_run(recorded, moved, {**provenance, "base_sha256": "3"}, "d"), "model.name")
