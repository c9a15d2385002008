"""Hugging Face's names: each has its original meaning or is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

import train
from nanoft import UserError
from nanoft.config import Config, TrainingConfig
from nanoft.config.aliases import ALIASES, RENAMED, SAME_NAME, TRANSLATED, pairs
from nanoft.config.loading import load_file
from nanoft.config.settings import SECTION_TYPES
from nanoft.optim import OPTIMIZERS, learning_rate
from nanoft.training.validation import validate_config
from tiny_models import make_chat_model, write_records

FIELDS = {f"{section}.{item.name}" for section, kind in SECTION_TYPES.items() for item in dataclasses.fields(kind)}
FLAT = {
    "model_name": "mistralai/Mistral-7B-Instruct-v0.3",
    "dataset_name": "some/chats",
    "max_seq_length": 4096,
    "use_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "use_nested_quant": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "max_grad_norm": 0.3,
    "weight_decay": 0.01,
    "optim": "paged_adamw_32bit",
    "adam_beta2": 0.95,
    "max_steps": -1,
    "neftune_noise_alpha": 5,
    "label_smoothing_factor": 0.1,
    "group_by_length": True,
    "packing": False,
    "eval_split": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_steps": 5,
    "report_to": "none",
    "output_dir": "runs/here",
    "seed": 42,
    "bf16": True,
    "fp16": False,
}
SECTIONED = """
model: {name: mistralai/Mistral-7B-Instruct-v0.3, max_seq_length: 4096, dtype: bfloat16}
quantization: {bits: 4, type: nf4, double: true}
lora: {rank: 32, alpha: 64, dropout: 0.05, target_modules: [q_proj, v_proj]}
data:
  train_file: hf://datasets/some/chats
  group_by_length: true
  packing: false
  validation_split: 0.1
training:
  num_epochs: 3
  micro_batch_size: 2
  gradient_accumulation_steps: 8
  checkpointing: full
  learning_rate: 2e-4
  lr_scheduler: cosine
  warmup_ratio: 0.05
  max_grad_norm: 0.3
  weight_decay: 0.01
  optimizer: adamw_paged
  beta2: 0.95
  neftune_alpha: 5
  label_smoothing: 0.1
  log_steps: 5
  eval_steps: 25
  save_steps: 50
  keep_checkpoints: 2
evaluation: {batch_size: 8}
output: {dir: runs/here}
system: {seed: 42}
"""


def flat_config(tmp_path: Path, **settings: Any) -> Config:
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(settings))
    return load_file(path)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_flat_file_says_the_same_as_sections(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "sections.yaml").write_text(SECTIONED)
    text = json.dumps(FLAT) if suffix == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in FLAT.items())
    (tmp_path / f"flat.{suffix}").write_text(text)
    assert load_file(tmp_path / f"flat.{suffix}") == load_file(tmp_path / "sections.yaml")


def test_every_name_leads_to_a_field() -> None:
    targets = {alias.field for alias in ALIASES.values()} - {""}
    for alias in ALIASES.values():
        values = alias.values.values() if isinstance(alias.values, dict) else []
        targets |= {field for value in values if isinstance(value, dict) for field in value}
    assert targets <= FIELDS
    assert len(targets) > 40


SMOOTHED = {"preference.beta": 0.2, "preference.label_smoothing": 0.1}
EPOCHS = {f"training.{name}_steps": "epoch" for name in ("save", "eval", "log")}


@pytest.mark.parametrize(
    ("flat", "changes"),
    [
        ({"lr_scheduler_type": "constant_with_warmup"}, {"training.lr_scheduler": "constant"}),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {"training.lr_scheduler": "wsd"}),
        ({"lr_scheduler_type": "cosine_with_restarts"}, {"training.lr_scheduler": "cosine_with_restarts"}),
        ({"lr_scheduler_type": ["linear"]}, {"training.lr_scheduler": "linear"}),
        ({"num_train_epochs": 1.5}, {"training.num_epochs": 1.5}),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"training.warmup_ratio": 0.1}),
        ({"warmup_steps": 0}, {"training.warmup_steps": 0}),
        ({"warmup_steps": 20}, {"training.warmup_steps": 20}),
        ({"warmup_steps": 0.1}, {"training.warmup_ratio": 0.1}),  # a share, in transformers 5
        ({"eval_split": 200}, {"data.validation_size": 200}),
        ({"dataset_name": "data/train.jsonl"}, {"data.train_file": "data/train.jsonl"}),
        ({"dataset_text_field": "body"}, {"data.columns": {"text": "body"}}),
        ({"use_4bit": False, "load_in_8bit": True}, {"quantization.bits": 8}),
        ({"use_peft": False}, {"training.method": "full"}),
        ({"target_modules": "all-linear"}, {"lora.target_modules": ("all-linear",)}),
        ({"rank_pattern": {"q_proj": 4}}, {"lora.rank_pattern": {"q_proj": 4}}),
        ({"train_sampling_strategy": "group_by_length"}, {"data.group_by_length": True}),
        ({"train_on_inputs": True}, {"data.train_on": "all"}),
        ({"save_strategy": "no", "eval_strategy": "no"}, {"training.save_steps": 0, "training.eval_steps": 0}),
        ({"save_strategy": "epoch", "evaluation_strategy": "epoch", "logging_strategy": "epoch"}, EPOCHS),
        ({"eval_strategy": "epoch", "eval_steps": 50}, {"training.eval_steps": "epoch"}),  # as in the Trainer
        ({"evaluation_strategy": "epoch", "eval_steps": 50}, {"training.eval_steps": "epoch"}),
        ({"save_strategy": "best", "save_steps": 50}, {"training.save_steps": 0}),  # the best is always saved
        ({"logging_strategy": "no"}, {"training.log_steps": 0}),
        ({"eval_steps": 0.25, "save_steps": 50.0}, {"training.eval_steps": 0.25, "training.save_steps": 50}),
        ({"eval_on_start": True}, {"evaluation.on_start": True}),
        ({"train_sampling_strategy": "sequential"}, {"training.shuffle": False}),
        ({"log_level": "critical"}, {"logging.level": "error"}),
        ({"log_level": "passive"}, {}),
        ({"max_steps": 7}, {"training.max_steps": 7}),
        ({"report_to": ["wandb"]}, {"logging.report_to": ("wandb",)}),
        ({"report_to": ["wandb", "trackio"]}, {"logging.report_to": ("wandb", "trackio")}),
        ({"use_cpu": True, "disable_tqdm": True}, {"system.device": "cpu", "logging.progress_bar": False}),
        ({"bf16": True, "torch_dtype": "bfloat16"}, {"model.dtype": "bfloat16"}),  # twice the same
        ({"fp16": True, "bnb_4bit_compute_dtype": "float16", "bf16": False}, {"model.dtype": "float16"}),
        ({"torch_dtype": "torch.float16"}, {"model.dtype": "float16"}),
        ({"dtype": "half"}, {"model.dtype": "float16"}),
        ({"rl": "dpo", "rl_beta": 0.2, "dpo_label_smoothing": 0.1}, {"training.objective": "dpo"} | SMOOTHED),
        ({"rl": "ipo"}, {"training.objective": "dpo", "preference.loss": "ipo"}),
        (
            {"rl": "dpo", "loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
            {"training.objective": "dpo"} | SMOOTHED,
        ),
        ({"loss_type": ["simpo"], "simpo_gamma": 1.0}, {"training.objective": "simpo", "preference.gamma": 1.0}),
        ({"rl": "kto", "desirable_weight": 1.3}, {"training.objective": "kto", "preference.desirable_weight": 1.3}),
        ({"save_total_limit": None, "deepspeed": None, "report_to": [], "modules_to_save": None}, {}),
    ],
    ids=str,
)
def test_values_are_translated(flat: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert flat_config(tmp_path, **flat) == Config().override(changes)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"lora_rnk": 8}, "lora_rnk: no such setting in a flat file: did you mean lora_r"),
        ({"xyzzy": 8}, "xyzzy: no such setting in a flat file: docs/configs.md lists the names"),
        ({"lora_r": 0}, "lora_r: lora.rank: 0 is out of range"),
        ({"num_train_epochs": 0}, "num_train_epochs: training.num_epochs: 0 is out of range"),
        ({"learning_rate": "fast"}, "learning_rate: training.learning_rate: 'fast' is not a finite number"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16: set model.dtype to bfloat16 and to float16: remove one"),
        ({"fp16": "yes"}, "fp16: 'yes' is not one of True, False"),
        ({"torch_dtype": "float8"}, "torch_dtype: 'float8' is not one of auto, float32, bfloat16, float16"),
        ({"fp16": True, "torch_dtype": "bfloat16"}, "fp16 and torch_dtype: set model.dtype to float16 and to bfloat16"),
        ({"bf16": True, "torch_dtype": "float32"}, "bf16 and torch_dtype: set model.dtype to bfloat16 and to float32"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit: set quantization.bits to 4"),
        ({"optim": 1}, "optim: training.optimizer: 1 is not a string"),
        ({"optim": {"training.learning_rate": 1}}, "optim: {'training.learning_rate': 1} is not one of adamw_torch"),
        ({"lr_scheduler_type": ["cosine", "linear"]}, "lr_scheduler_type: ['cosine', 'linear'] is not one of "),
        (
            {"eval_steps": {"training.learning_rate": 1}},
            "eval_steps: training.eval_steps: {'training.learning_rate': 1}",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, "lr_scheduler_type and warmup_steps: set training."),
        ({"eval_strategy": "often"}, "eval_strategy: 'often' is not one of steps, no, epoch: set eval_steps"),
        ({"save_strategy": "often"}, "save_strategy: 'often' is not one of steps, no, epoch, best: set save_steps"),
        ({"eval_steps": 1.5}, "training.eval_steps: 1.5: set a number of steps, a fraction of the run below 1, or"),
        ({"log_level": "trace"}, "log_level: 'trace' is not one of debug, info, warning, error"),
        ({"eval_strategy": "no", "eval_steps": 9}, "eval_strategy and eval_steps: set training.eval_steps to 0 and"),
        ({"rl": "ppo"}, "rl: 'ppo' is not one of dpo, kto, orpo, simpo, ipo"),
        ({"loss_type": "hinge"}, "loss_type: 'hinge' is not one of sigmoid, robust, ipo, dpo, kto, orpo, simpo"),
        ({"deepspeed": {"stage": 3}}, "deepspeed: {'stage': 3} is not one of"),
        ({"push_to_hub": True}, "push_to_hub: True is not one of False: remove it: nothing is uploaded"),
        ({"trust_remote_code": True}, "remove it: code that comes with a model is never run"),
        ({"use_peft": False, "use_4bit": True}, "quantization.bits: 4 needs a frozen base"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_is_one_line(flat: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        flat_config(tmp_path, **flat)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(str(tmp_path / "flat.json"))


def test_a_section_among_flat_names_is_a_file_of_sections(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_r: no such section"):
        flat_config(tmp_path, model={"name": "x"}, lora_r=8)


@pytest.mark.parametrize("name", [item.value for item in OptimizerNames])
def test_an_optimizer_is_the_one_that_transformers_makes_or_refused(name: str, tmp_path: Path) -> None:
    if flat_config(tmp_path, optim=name).training.optimizer not in OPTIMIZERS:
        with pytest.raises(UserError, match=f"training.optimizer: '{name}' is not known"):
            validate_config(flat_config(tmp_path, optim=name))
        return
    theirs, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    t = flat_config(tmp_path, optim=name).training
    if t.optimizer == "sgd":
        assert theirs is torch.optim.SGD
        assert t.momentum == options.get("momentum", 0.0)
        return
    assert "AdamW" in theirs.__name__
    assert options.get("is_paged", False) == t.optimizer.endswith("_paged")
    assert (options.get("optim_bits") == 8) == ("8bit" in t.optimizer)
    assert (t.beta1, t.beta2, t.epsilon) == (*options["betas"], options["eps"])


NOT_THERE = {"inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "greedy"}


@pytest.mark.parametrize("name", sorted(item.value for item in SchedulerType))
def test_a_schedule_has_the_rates_of_transformers(name: str, tmp_path: Path) -> None:
    """transformers' warm-up begins at 0, nanoft's one step later: compared from the end of the warm-up."""
    if name in NOT_THERE:
        with pytest.raises(UserError, match=f"training.lr_scheduler: '{name}' is not known"):
            validate_config(flat_config(tmp_path, lr_scheduler_type=name))
        return
    warmup, total = 10, 110
    given = {} if name == "constant" else {"warmup_steps": warmup}
    extra = {"num_decay_steps": 10} if name == "warmup_stable_decay" else {}  # training.lr_decay_ratio: 0.1 of 100
    t = flat_config(tmp_path, lr_scheduler_type=name, learning_rate=1.0, **given).training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    for step in range(total):
        if step >= warmup or name == "constant":
            ours = learning_rate(step, total, t)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        schedule.step()


def test_the_trainer_has_the_names_that_are_said_to_be_its_own() -> None:
    """Every training setting has a name that transformers, or PEFT's LoRA+, knows."""
    known = {item.name for item in dataclasses.fields(TrainingArguments)} | {"loraplus_lr_ratio", "warmup_ratio"}
    known |= {"early_stopping_patience", "early_stopping_threshold"}  # of its callback
    renamed = {field: field.partition(".")[2] for field in SAME_NAME.split()}
    for name, field in pairs(RENAMED).items():
        renamed[field] = f"{renamed.get(field, '')} {name}"
    training = [names.split() for field, names in renamed.items() if field.startswith("training.")]
    training += [
        n.split() for n, alias in TRANSLATED.items() if alias.field.startswith("training.") and "peft" not in n
    ]
    assert len(training) > 20
    assert [names for names in training if not known & set(names)] == []
    assert len(ALIASES) == sum(len(names.split()) for names in [*renamed.values(), *TRANSLATED])  # none twice


def test_a_flat_file_runs(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    flat = {
        "model_name_or_path": str(tmp_path / "base"),
        "train_file": str(write_records(tmp_path / "data.jsonl")),
        "max_seq_length": 256,
        "lora_r": 4,
        "use_4bit": True,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "eval_split": 0.1,
        "max_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    assert train.main([str(tmp_path / "flat.json"), "evaluation.prompts=2"]) == 0
    assert load_file(tmp_path / "run" / "config.json").quantization.bits == 4


def test_defaults_are_those_of_nanoft(tmp_path: Path) -> None:
    assert flat_config(tmp_path, lora_r=16) == Config()
    assert TrainingConfig().learning_rate == 2e-4


DOCUMENT = (Path(__file__).parents[2] / "docs" / "configs.md").read_text(encoding="utf-8")


def test_the_document_lists_every_name() -> None:
    assert [name for name in ALIASES if f"`{name}`" not in DOCUMENT] == []
    rows = re.findall(r"^\| (`.*`) \| `([\w.]+)` \|$", DOCUMENT, re.MULTILINE)
    shown = {name: field for names, field in rows for name in re.findall(r"`(\w+)`", names)}
    assert shown == {name: alias.field for name, alias in ALIASES.items() if alias.field}


def test_the_examples_of_the_document_say_the_same(tmp_path: Path) -> None:
    configs = []
    for language in ("yaml", "json"):
        (block,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
        (tmp_path / f"mine.{language}").write_text(block)
        configs.append(load_file(tmp_path / f"mine.{language}"))
    assert configs[0] == configs[1] != Config()
