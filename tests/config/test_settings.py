"""Settings: what is accepted, what is refused in one line, and which source wins."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.config import (
    Config,
    LoRAConfig,
    ModelConfig,
    QuantizationConfig,
    TrainingConfig,
)
from nanoft.config.settings import config_warnings

DIFFERENT = {  # something else than the default in every section
    "model.name": "some/model",
    "lora.target_modules": ("q_proj", "v_proj"),
    "lora.alpha": 8.0,
    "quantization.bits": 4,
    "data.validation_file": "held_out.jsonl",
    "data.max_samples": 7,
    "training.learning_rate": 1e-5,
    "preference.beta": 0.3,
    "rl.reward": ("exact_match",),
    "distill.beta": 0.5,
    "guard.max_skips": 2,
    "output.dir": "runs/x",
    "logging.progress_bar": False,
    "system.seed": 2**32 - 1,
    "evaluation.max_samples": 3,
    "evaluation.metrics": ("token_f1", "max_words:3"),
}


def refused(action: Callable[[], Any], *parts: str) -> None:
    """The action raises a UserError of one line that contains every part."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.rank": 4.0}, "lora.rank: 4.0 is not an integer"),
        ({"lora.rank": True}, "lora.rank: True is not an integer"),
        ({"training.learning_rate": True}, "training.learning_rate: True is not a finite number"),
        ({"training.learning_rate": float("nan")}, "nan is not a finite number"),
        ({"training.learning_rate": float("inf")}, "inf is not a finite number"),
        ({"training.learning_rate": 10**400}, "is not a finite number"),
        ({"training.learning_rate": "nan"}, "nan is not a finite number"),
        ({"training.learning_rate": "fast"}, "'fast' is not a finite number"),
        ({"data.packing": 1}, "data.packing: 1 is not true or false"),
        ({"data.packing": "yes"}, "'yes' is not true or false"),
        ({"model.name": None}, "model.name: None is not a string"),
        ({"model.dtype": "float8"}, "'float8' is not one of auto, float32, bfloat16, float16"),
        ({"quantization.bits": 3}, "quantization.bits: 3 is not one of 4, 8, 16"),
        ({"quantization.bits": 4.0}, "quantization.bits: 4.0 is not one of 4, 8, 16"),
        ({"lora.target_modules": ["q_proj", 1]}, "is not a list of names"),
        ({"training.max_steps": "1.5"}, "'1.5' is not an integer (64 bits) or none"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(change: dict[str, Any], message: str) -> None:
    refused(lambda: Config().override(change), message)


def test_a_section_checks_itself_when_it_is_made() -> None:
    refused(lambda: LoRAConfig(rank="8"), "lora.rank: '8' is not an integer")  # type: ignore[arg-type]
    refused(lambda: LoRAConfig(target_modules=["q_proj"]), "is not a list of names")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lora.rank = 4  # type: ignore[misc]


def test_a_whole_number_is_a_number() -> None:
    assert Config().override({"lora.alpha": 8}).lora.alpha == 8


@pytest.mark.parametrize(
    ("name", "low", "high", "step"),
    [
        ("lora.rank", 1, 4096, 1),
        ("lora.dropout", 0.0, 0.99, 0.001),
        ("data.validation_split", 0.0, 0.9, 0.001),
        ("training.warmup_ratio", 0.0, 1.0, 0.001),
        ("training.beta2", 0.0, 0.99999, 0.00001),
        ("system.seed", 0, 2**32 - 1, 1),
    ],
)
def test_both_ends_of_a_range_are_in_it_and_nothing_beyond(name: str, low: float, high: float, step: float) -> None:
    for value in (low, high):
        Config().override({name: value})
    for value in (low - step, high + step):
        refused(lambda value=value: Config().override({name: value}), f"{name}: {value} is out of range")


def test_a_range_without_an_upper_end_says_so() -> None:
    refused(lambda: Config().override({"training.max_steps": 0}), "it must be >= 1")
    assert Config().override({"training.max_steps": None}).training.max_steps is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.learning_rat", "did you mean training.learning_rate?"),
        ("trainig.max_steps", "trainig.max_steps: no such section: did you mean training?"),
        ("learning_rate", "did you mean training.learning_rate?"),
        ("lora.zzzz", "no such field: choose one of rank, alpha, dropout, target_modules"),
        ("zzzz.rank", "no such section: choose one of model, lora,"),
        ("lora.rank.x", "lora.rank.x: no such field"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(key: str, message: str) -> None:
    refused(lambda: Config().override({key: "1"}), message)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate", "2e-4", 2e-4),
        ("training.max_steps", "20", 20),
        ("training.max_steps", "none", None),
        ("data.validation_file", "", None),
        ("data.packing", "True", True),
        ("quantization.bits", "4", 4),
        ("lora.target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.target_modules", "[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("lora.target_modules", "attention", ("attention",)),
        ("lora.target_modules", "all-linear", Config().lora.target_modules),
        ("lora.target_modules", r".*\.(q|v)_proj", (r".*\.(q|v)_proj",)),
        ("lora.target_modules", "[qv]_proj", ("[qv]_proj",)),
        ("lora.target_modules", r"layers\.\d{1,2}\.mlp\..*", (r"layers\.\d{1,2}\.mlp\..*",)),
        ("lora.rank_pattern", "{q_proj: 8, 'layers.0.*': 4}", {"q_proj": 8, "layers.0.*": 4}),
        ("lora.alpha_pattern", "{q_proj: 8.5}", {"q_proj": 8.5}),
        ("model.name", "none", "none"),  # a text that may not be missing is taken as it stands
    ],
)
def test_a_text_is_read_as_the_type_of_its_field(key: str, text: str, value: Any) -> None:
    section, name = key.split(".")
    config = Config().override({"data.packing": False, "training.max_steps": 3, "data.validation_file": "v", key: text})
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.method": "full", "quantization.bits": 4}, "quantization.bits: 4 needs a frozen base"),
        ({"model.random_init": True}, "model.random_init: adapters cannot train random weights"),
        (
            {"training.method": "full", "training.lora_plus_ratio": 4.0},
            "training.lora_plus_ratio: needs training.method=lora",
        ),
        ({"lora.target_modules": ()}, "lora.target_modules: empty"),
        ({"lora.target_modules": ""}, "lora.target_modules: empty"),
        ({"lora.target_modules": r".*\.(q_proj"}, "lora.target_modules: '.*\\\\.(q_proj' is not a regular expression"),
        ({"lora.rank_pattern": {"q_proj": 0}}, "lora.rank_pattern: 0 is out of range: it must be between 1 and 4096"),
        ({"lora.rank_pattern": {"q_proj": 2.0}}, "lora.rank_pattern: {'q_proj': 2.0} is not a mapping"),
        ({"lora.rank_pattern": {1: 2}}, "lora.rank_pattern: {1: 2} is not a mapping"),
        ({"lora.alpha_pattern": {"q_proj": 0}}, "lora.alpha_pattern: 0 is out of range: it must be >= 1e-06"),
        ({"lora.alpha_pattern": {"*": 1}}, "lora.alpha_pattern: '*' is not a regular expression"),
        ({"model.add_tokens": ("<a>",), "training.method": "full"}, "model.add_tokens: trains rows beside a frozen"),
        (
            {"data.train_file": "a.jsonl", "data.validation_file": "a.jsonl"},
            "data.validation_file: equals data.train_file",
        ),
    ],
)
def test_sections_that_cannot_work_together_are_refused(changes: dict[str, Any], message: str) -> None:
    refused(lambda: Config().override(changes), message)


def test_both_halves_of_a_rule_may_change_at_once() -> None:
    config = Config(quantization=QuantizationConfig(bits=4))
    changed = config.override({"training.method": "full", "quantization.bits": 16, "model.random_init": True})
    assert (changed.training.method, changed.quantization.bits) == ("full", 16)
    assert config.training.method == "lora"  # the original is untouched


def test_the_effective_batch_is_rows_times_micro_batches() -> None:
    training = TrainingConfig(micro_batch_size=3, gradient_accumulation_steps=5)
    assert Config(training=training).effective_batch_size() == 15


def test_the_effective_batch_of_rewards_is_prompts_times_answers() -> None:
    config = Config().override({"rl.reward": ("exact_match",), "rl.prompts": 3, "rl.group_size": 5})
    assert config.effective_batch_size() == 15


# --- files


def test_to_dict_survives_json_and_comes_back_equal() -> None:
    config = Config().override(DIFFERENT)
    tree = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(tree) == config
    defaults = Config().to_dict()
    assert all(tree[section] != defaults[section] for section in tree)
    assert Config.from_dict({}) == Config()


def test_the_environment_of_the_process_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora: {rank: 4}")
    code = f"from nanoft.config.loading import load_config; print(load_config({str(file)!r}).lora.rank)"
    environment = {**os.environ, "NANOFT_LORA__RANK": "5"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "5"


# --- warnings


@pytest.mark.parametrize(
    ("fine", "doubtful", "message"),
    [
        ({"training.warmup_ratio": 0.2}, {"training.warmup_ratio": 0.21}, "warmup_ratio=0.21"),
        (
            {"training.warmup_steps": 20, "training.max_steps": 100},
            {"training.warmup_steps": 21, "training.max_steps": 100},
            "warmup_steps=21",
        ),
        (
            {"training.micro_batch_size": 2, "training.gradient_accumulation_steps": 2},
            {"training.micro_batch_size": 3, "training.gradient_accumulation_steps": 1},
            "effective batch size 3",
        ),
        ({"training.learning_rate": 5e-4}, {"training.learning_rate": 6e-4}, "learning_rate=0.0006"),
        (
            {"training.method": "full", "training.learning_rate": 1e-4},
            {"training.method": "full", "training.learning_rate": 2e-4},
            "learning_rate=0.0002",
        ),
    ],
)
def test_what_is_probably_not_meant_is_said(fine: dict[str, Any], doubtful: dict[str, Any], message: str) -> None:
    assert config_warnings(Config().override(fine)) == []
    (warning,) = config_warnings(Config().override(doubtful))
    assert message in warning


def test_a_setting_that_has_no_effect_is_not_warned_about() -> None:
    ratio_is_beaten = TrainingConfig(warmup_ratio=0.9, warmup_steps=0)
    from_scratch = TrainingConfig(method="full", learning_rate=2e-3)
    assert config_warnings(Config(training=ratio_is_beaten)) == []
    assert config_warnings(Config(training=TrainingConfig(optimizer="sgd", learning_rate=0.5))) == []
    assert config_warnings(Config(training=from_scratch, model=ModelConfig(random_init=True))) == []


def test_more_is_warned_of_once_the_number_of_steps_is_known() -> None:
    config = Config(training=TrainingConfig(warmup_steps=30))
    assert config_warnings(config) == config_warnings(config, 150) == []
    assert "warmup_steps=30: more than 20 %" in config_warnings(config, 149)[0]


def test_windows_that_do_not_overlap_are_refused() -> None:
    change = {"evaluation.stride": 64, "model.max_seq_length": 64}
    refused(lambda: Config().override(change), "evaluation.stride: 64: windows of model.max_seq_length=64")
    assert Config().override({**change, "evaluation.stride": 63}).evaluation.stride == 63
