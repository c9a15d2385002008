"""Files of two other schemas run unchanged: each field takes effect, is refused, or is reported with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from nanoft import UserError
from nanoft.config import Config, load_config, load_file
from nanoft.config.loading import CONFIGS, Loaded, read_config
from nanoft.config.schemas import MLX, MODELFORGE, SUPPLIED
from tiny_models import make_chat_model, write_records

DOCUMENT = (Path(__file__).parents[2] / "docs" / "schemas.md").read_text(encoding="utf-8")

# Every field of the MLX schema with its default there (a null where there is none), in YAML as its users write it.
MLX_FILE = """
model:
  name: mistralai/Mistral-7B-Instruct-v0.3
  cache_dir: ~/.cache/huggingface
  dtype: float16
  max_seq_length: 2048
  trust_remote_code: true
lora: {rank: 16, alpha: 32, dropout: 0.05, target_modules: [q_proj, v_proj], bias: none, task_type: CAUSAL_LM}
data: {dataset_path: "", train_split: 0.9, shuffle: true, seed: 42, max_examples: null, validation_size: null}
training:
  batch_size: 2
  gradient_accumulation_steps: 4
  num_epochs: 3
  max_steps: null
  learning_rate: 2.0e-4
  weight_decay: 0.01
  adam_beta1: 0.9
  adam_beta2: 0.999
  adam_epsilon: 1.0e-8
  max_grad_norm: 1.0
  lr_scheduler_type: cosine
  warmup_steps: 100
  warmup_ratio: null
  min_lr_ratio: 0.1
  logging_steps: 10
  eval_steps: 50
  save_steps: 100
  save_total_limit: 3
  save_best_checkpoint: true
  load_best_at_end: true
  label_smoothing: 0.0
  early_stopping_patience: null
  early_stopping_threshold: 1.0e-4
output:
  output_dir: ./outputs
  checkpoint_dir: ./outputs/checkpoints
  final_model_dir: ./outputs/final_model
  logs_dir: ./outputs/logs
  metrics_dir: ./outputs/metrics
  overwrite_output_dir: false
logging:
  level: INFO
  console: true
  file: true
  log_file: ./outputs/logs/training.log
  json_logs: true
  tensorboard: false
  wandb: false
system: {seed: 42, num_workers: 0, device: mps, mixed_precision: true}
monitoring:
  track_memory: true
  memory_log_steps: 50
  track_gradients: true
  gradient_log_steps: 100
  save_metrics_plot: true
  plot_frequency: epoch
evaluation:
  eval_on_start: false
  eval_accumulation_steps: 10
  generate_samples: true
  num_samples: 5
  sample_max_length: 100
  sample_temperature: 0.7
  sample_top_p: 0.9
advanced:
  gradient_checkpointing: false
  compile_model: false
  use_cache: true
  pad_to_multiple_of: null
  dataloader_pin_memory: false
  debug_mode: false
  profile_training: false
  detect_anomaly: false
"""
MLX_TREE: dict[str, dict[str, Any]] = yaml.safe_load(MLX_FILE)
MLX_FIELDS = {f"{section}.{name}": value for section, fields in MLX_TREE.items() for name, value in fields.items()}
LAYOUT, SAME = "has its own layout", "already nanoft's default"
# field -> value -> fields that it sets; or what is refused, after "error: "; or what is reported
MLX_CASES: dict[str, list[tuple[Any, dict[str, Any] | str]]] = {
    "model.name": [("a", {"model.name": "a"}), ("b/c", {"model.name": "b/c"})],
    "model.cache_dir": [("/cache", {"model.cache_dir": "/cache"}), ("~/x", {"model.cache_dir": "~/x"})],
    "model.dtype": [
        ("float16", {"model.dtype": "float16"}),
        ("bfloat16", {"model.dtype": "bfloat16"}),
        ("int4", "error: model.dtype: 'int4' is not one of auto, float32"),
    ],
    "model.max_seq_length": [(512, {"model.max_seq_length": 512}), (0, "error: model.max_seq_length: 0 is out of")],
    "model.trust_remote_code": [(True, "code that comes with a model is never run"), (False, SAME)],
    "lora.rank": [(8, {"lora.rank": 8}), (0, "error: lora.rank: 0 is out of range")],
    "lora.alpha": [(64, {"lora.alpha": 64}), (0, "error: lora.alpha: 0 is out of range")],
    "lora.dropout": [(0.2, {"lora.dropout": 0.2}), (1, "error: lora.dropout: 1 is out of range")],
    "lora.target_modules": [
        (["k_proj"], {"lora.target_modules": ("k_proj",)}),
        (["q_proj", "o_proj"], {"lora.target_modules": ("q_proj", "o_proj")}),
    ],
    "lora.bias": [("all", {"lora.bias": "all"}), ("some", "error: lora.bias: 'some' is not one of none, all")],
    "lora.task_type": [("CAUSAL_LM", SAME), ("SEQ_CLS", "error: nanoft trains causal language models")],
    "data.dataset_path": [("a.jsonl", {"data.train_file": "a.jsonl"}), ("b.csv", {"data.train_file": "b.csv"})],
    "data.train_split": [
        (0.8, {"data.validation_split": 0.2}),
        (0.95, {"data.validation_split": 0.05}),
        (0, "error: data.train_split: 0 must be a number > 0 and <= 0.999"),
        (1.0, "error: data.train_split: 1.0 must be a number > 0 and <= 0.999"),
    ],
    "data.shuffle": [(True, {"training.shuffle": True}), (False, {"training.shuffle": False})],
    "data.seed": [(1, "system.seed also seeds"), (2, "system.seed also seeds")],
    "data.max_examples": [(100, {"data.max_samples": 100}), (None, {"data.max_samples": None})],
    "data.validation_size": [(20, {"data.validation_size": 20}), (None, {"data.validation_size": None})],
    "training.batch_size": [
        (1, {"training.micro_batch_size": 1}),
        (0, "error: training.batch_size: training.micro_ba"),
    ],
    "training.gradient_accumulation_steps": [
        (8, {"training.gradient_accumulation_steps": 8}),
        (0, "error: training.gradient_accumulation_steps: 0 is out of range"),
    ],
    "training.num_epochs": [(1, {"training.num_epochs": 1}), (2, {"training.num_epochs": 2})],
    "training.max_steps": [(9, {"training.max_steps": 9}), (None, {"training.max_steps": None})],
    "training.learning_rate": [(1e-5, {"training.learning_rate": 1e-5}), (-1, "error: training.learning_rate: -1 ")],
    "training.weight_decay": [(0.1, {"training.weight_decay": 0.1}), (0.0, {"training.weight_decay": 0.0})],
    "training.adam_beta1": [(0.8, {"training.beta1": 0.8}), (0.7, {"training.beta1": 0.7})],
    "training.adam_beta2": [(0.95, {"training.beta2": 0.95}), (0.9, {"training.beta2": 0.9})],
    "training.adam_epsilon": [(1e-6, {"training.epsilon": 1e-6}), (1e-7, {"training.epsilon": 1e-7})],
    "training.max_grad_norm": [(0.5, {"training.max_grad_norm": 0.5}), (2.0, {"training.max_grad_norm": 2.0})],
    "training.lr_scheduler_type": [
        ("linear", {"training.lr_scheduler": "linear", "training.warmup_steps": 100}),
        ("constant", {"training.lr_scheduler": "constant", "training.warmup_steps": 100}),
        ("polynomial", "error: training.lr_scheduler_type: 'polynomial' is not one of cosine, linear, constant"),
    ],
    "training.warmup_steps": [(0, {"training.warmup_steps": 0}), (20, {"training.warmup_steps": 20})],
    "training.warmup_ratio": [
        (0.1, {"training.warmup_ratio": 0.1, "training.warmup_steps": None}),
        (None, {"training.warmup_steps": 100}),
    ],
    "training.min_lr_ratio": [(0.2, {"training.min_lr_ratio": 0.2}), (0.0, {"training.min_lr_ratio": 0.0})],
    "training.logging_steps": [(1, {"training.log_steps": 1}), (2, {"training.log_steps": 2})],
    "training.eval_steps": [(5, {"training.eval_steps": 5}), (0.25, {"training.eval_steps": 0.25})],
    "training.save_steps": [(5, {"training.save_steps": 5}), ("epoch", {"training.save_steps": "epoch"})],
    "training.save_total_limit": [(1, {"training.keep_checkpoints": 1}), (2, {"training.keep_checkpoints": 2})],
    "training.save_best_checkpoint": [(True, SAME), (False, "the best checkpoint is always kept")],
    "training.load_best_at_end": [(True, SAME), (False, "error: the result is always the best checkpoint")],
    "training.label_smoothing": [(0.1, {"training.label_smoothing": 0.1}), (0.0, {"training.label_smoothing": 0.0})],
    "training.early_stopping_patience": [
        (3, {"training.early_stopping_patience": 3}),
        (None, {"training.early_stopping_patience": 0}),
    ],
    "training.early_stopping_threshold": [
        (0.1, "no effect with training.early_stopping_patience: null"),
        (0.2, "no effect with training.early_stopping_patience: null"),
    ],
    "output.output_dir": [("a", {"output.dir": "a"}), ("b", {"output.dir": "b"})],
    "output.checkpoint_dir": [("a", LAYOUT), ("b", LAYOUT)],
    "output.final_model_dir": [("a", LAYOUT), ("b", LAYOUT)],
    "output.logs_dir": [("a", LAYOUT), ("b", LAYOUT)],
    "output.metrics_dir": [("a", LAYOUT), ("b", LAYOUT)],
    "output.overwrite_output_dir": [(False, SAME), (True, "error: a run is never overwritten")],
    "logging.level": [
        ("DEBUG", {"logging.level": "debug"}),
        ("INFO", {"logging.level": "info"}),
        ("WARNING", {"logging.level": "warning"}),
        ("ERROR", {"logging.level": "error"}),
        ("LOUD", "error: logging.level: 'LOUD' is not one of debug, info"),
    ],
    "logging.console": [(True, SAME), (False, {"logging.progress_bar": False, "logging.show_example": False})],
    "logging.file": [(True, SAME), (False, "train.log is always written")],
    "logging.log_file": [("a.log", LAYOUT), ("b.log", LAYOUT)],
    "logging.json_logs": [(True, SAME), (False, "metrics.jsonl is always written")],
    "logging.tensorboard": [(True, {"logging.report_to": "tensorboard"}), (False, {"logging.report_to": "none"})],
    "logging.wandb": [
        (True, {"logging.report_to": "wandb"}),
        (False, {"logging.report_to": "none"}),
        ("maybe", "error: logging.wandb: 'maybe' is not one of False, True"),
    ],
    "system.seed": [(1, {"system.seed": 1}), (2, {"system.seed": 2})],
    "system.num_workers": [(0, SAME), (4, "batches are made by the process that trains")],
    "system.device": [("cpu", {"system.device": "cpu"}), ("mps", {"system.device": "mps"}), ("tpu", "error: tpu")],
    "system.mixed_precision": [(True, {"model.dtype": "float16"}), (False, {"model.dtype": "float32"})],
    "monitoring.track_memory": [(True, SAME), (False, "memory is always watched")],
    "monitoring.memory_log_steps": [(5, "every train line includes the memory"), (50, "every train line includes")],
    "monitoring.track_gradients": [(True, {"logging.gradient_steps": 100}), (False, {"logging.gradient_steps": 0})],
    "monitoring.gradient_log_steps": [(5, {"logging.gradient_steps": 5}), (7, {"logging.gradient_steps": 7})],
    "monitoring.save_metrics_plot": [(True, {"logging.plots": "epoch"}), (False, {"logging.plots": "none"})],
    "monitoring.plot_frequency": [
        ("step", {"logging.plots": "step"}),
        ("end", {"logging.plots": "end"}),
        ("weekly", "error: monitoring.plot_frequency: logging.plots: 'weekly' is not one of"),
    ],
    "evaluation.eval_on_start": [(True, {"evaluation.on_start": True}), (False, {"evaluation.on_start": False})],
    "evaluation.eval_accumulation_steps": [(1, "an evaluation keeps sums"), (10, "an evaluation keeps sums")],
    "evaluation.generate_samples": [(True, {"evaluation.samples": 5}), (False, {"evaluation.samples": 0})],
    "evaluation.num_samples": [(2, {"evaluation.samples": 2}), (7, {"evaluation.samples": 7})],
    "evaluation.sample_max_length": [(9, {"evaluation.max_new_tokens": 9}), (7, {"evaluation.max_new_tokens": 7})],
    "evaluation.sample_temperature": [
        (1.0, {"evaluation.temperature": 1.0}),
        (0, "error: evaluation.sample_temperature: 0 must be a number > 0 and <= 2"),
        (2.5, "error: evaluation.sample_temperature: 2.5 must be a number > 0 and <= 2"),
    ],
    "evaluation.sample_top_p": [
        (0.5, {"evaluation.top_p": 0.5}),
        (0.0, "error: evaluation.top_p: 0.0 is out of range"),
    ],
    "advanced.gradient_checkpointing": [
        (True, {"training.checkpointing": "full"}),
        (False, {"training.checkpointing": "none"}),
    ],
    "advanced.compile_model": [(True, {"training.compile": True}), (False, {"training.compile": False})],
    "advanced.use_cache": [(True, SAME), (False, "the cache is always used")],
    "advanced.pad_to_multiple_of": [(8, {"data.pad_to_multiple_of": 8}), (None, {"data.pad_to_multiple_of": 1})],
    "advanced.dataloader_pin_memory": [(False, SAME), (True, "changes no result here")],
    "advanced.debug_mode": [(True, {"system.debug": True}), (False, {"system.debug": False})],
    "advanced.profile_training": [(True, {"system.profile": True}), (False, {"system.profile": False})],
    "advanced.detect_anomaly": [(True, {"system.debug": True}), (False, {"system.debug": False})],
}
FORGE = {"task": "text-generation", "model_name": "m", "dataset": "d.jsonl", "compute_specs": "low_end"}
# The fields of the ModelForge schema with their defaults there; ...: required
FORGE_FIELDS: dict[str, Any] = {
    **dict.fromkeys(FORGE, ...), "provider": "huggingface", "strategy": "sft",
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
    "use_4bit": True, "use_8bit": False, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4",
    "use_nested_quant": False, "fp16": False, "bf16": False,
    "num_train_epochs": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "max_grad_norm": 0.3, "learning_rate": 2e-4,
    "weight_decay": 0.001, "optim": "paged_adamw_32bit", "lr_scheduler_type": "cosine", "max_steps": -1,
    "warmup_ratio": 0.03, "group_by_length": True, "packing": False, "max_seq_length": None,
    "eval_split": 0.2, "eval_steps": 100,
}  # fmt: skip
FORGE_CASES: dict[str, list[tuple[Any, dict[str, Any] | str]]] = {
    "task": [
        ("text-generation", {"data.format": "auto"}),
        ("summarization", {"data.format": "summarization"}),
        ("extractive-question-answering", {"data.format": "extractive_qa"}),
        ("translation", "error: task: 'translation' is not one of text-generation, summarization, extractive-q"),
    ],
    "model_name": [("a/b", {"model.name": "a/b"}), ("c", {"model.name": "c"})],
    "provider": [
        ("huggingface", SAME),
        ("unsloth", "nanoft's own kernels are used"),
        ("openai", "error: provider: 'openai' is not one of huggingface, unsloth"),
    ],
    "strategy": [
        ("sft", {"training.objective": "sft", "training.method": "lora"}),
        ("qlora", {"training.objective": "sft", "training.method": "lora", "quantization.bits": 4}),
        ("dpo", {"training.objective": "dpo"}),  # `validate_config` knows whether there is one
        ("rlhf", {"training.objective": "grpo"}),
        ("magic", "error: strategy: 'magic' is not one of sft, qlora, dpo, rlhf"),
    ],
    "dataset": [("a.jsonl", {"data.train_file": "a.jsonl"}), ("b", {"data.train_file": "b"})],
    "compute_specs": [
        ("low_end", "configs/gpu_8gb.py supplies the missing settings"),
        ("mid_range", "configs/gpu_12gb.py supplies the missing settings"),
        ("high_end", "configs/gpu_24gb.py supplies the missing settings"),
        ("huge", "error: compute_specs: 'huge' is not one of low_end, mid_range, high_end"),
        (None, "error: compute_specs: None: set low_end (4-6 GB)"),
        (["low_end"], "error: compute_specs: ['low_end']: set low_end (4-6 GB)"),
        ({}, "error: compute_specs: {}: set low_end (4-6 GB)"),
    ],
    "lora_r": [
        (1, {"lora.rank": 1}),
        (256, {"lora.rank": 256}),
        (257, "error: lora_r: 257 must be a whole number"),
    ],
    "lora_alpha": [(8, {"lora.alpha": 8}), (64, {"lora.alpha": 64})],
    "lora_dropout": [(0.0, {"lora.dropout": 0.0}), (0.5, {"lora.dropout": 0.5})],
    "use_4bit": [(True, {"quantization.bits": 4}), (False, {"quantization.bits": 16})],
    "use_8bit": [(True, {"quantization.bits": 8}), (False, {"quantization.bits": 4})],
    "bnb_4bit_compute_dtype": [
        ("float16", {"model.dtype": "float16"}),
        ("bfloat16", {"model.dtype": "bfloat16"}),
        ("float32", {"model.dtype": "float32"}),
    ],
    "bnb_4bit_quant_type": [("nf4", {"quantization.type": "nf4"}), ("fp4", {"quantization.type": "fp4"})],
    "use_nested_quant": [(True, {"quantization.double": True}), (False, {"quantization.double": False})],
    "fp16": [(True, {"model.dtype": "float16"}), (False, {"model.dtype": "auto"})],
    "bf16": [(True, {"model.dtype": "bfloat16"}), (False, {"model.dtype": "auto"})],
    "num_train_epochs": [
        (2, {"training.num_epochs": 2}),
        (1, {"training.num_epochs": 1}),
        (0, "error: num_train_epochs: 0 must be a whole number > 0"),
    ],
    "per_device_train_batch_size": [
        (3, {"training.micro_batch_size": 3}),
        (0, "error: per_device_train_batch_size: training.micro_batch_size: 0 is out of range"),
    ],
    "per_device_eval_batch_size": [(3, {"evaluation.batch_size": 3}), (5, {"evaluation.batch_size": 5})],
    "gradient_accumulation_steps": [
        (3, {"training.gradient_accumulation_steps": 3}),
        (5, {"training.gradient_accumulation_steps": 5}),
    ],
    "gradient_checkpointing": [
        (True, {"training.checkpointing": "full"}),
        (False, {"training.checkpointing": "none"}),
    ],
    "max_grad_norm": [(1.0, {"training.max_grad_norm": 1.0}), (0.5, {"training.max_grad_norm": 0.5})],
    "learning_rate": [
        (1, {"training.learning_rate": 1}),
        (1e-5, {"training.learning_rate": 1e-5}),
        (0, "error: learning_rate: training.learning_rate: 0 is out of range"),
        (1.5, "error: learning_rate: training.learning_rate: 1.5 is out of range"),
    ],
    "weight_decay": [(0.0, {"training.weight_decay": 0.0}), (0.1, {"training.weight_decay": 0.1})],
    "optim": [
        ("adamw_torch", {"training.optimizer": "adamw"}),
        ("adamw_8bit", {"training.optimizer": "adamw_8bit"}),
        ("paged_adamw_32bit", {"training.optimizer": "adamw_paged"}),
        ("sgd", {"training.optimizer": "sgd", "training.momentum": 0.0}),
    ],
    "lr_scheduler_type": [
        ("linear", {"training.lr_scheduler": "linear"}),
        ("cosine", {"training.lr_scheduler": "cosine"}),
        ("constant", {"training.lr_scheduler": "constant", "training.warmup_steps": 0}),
        ("polynomial", {"training.lr_scheduler": "polynomial"}),
    ],
    "max_steps": [(-1, {"training.max_steps": None}), (9, {"training.max_steps": 9})],
    "warmup_ratio": [(0.1, {"training.warmup_ratio": 0.1}), (0.2, {"training.warmup_ratio": 0.2})],
    "group_by_length": [(True, {"data.group_by_length": True}), (False, {"data.group_by_length": False})],
    "packing": [(True, {"data.packing": True}), (False, {"data.packing": False})],
    "max_seq_length": [(None, {"model.max_seq_length": 2048}), (512, {"model.max_seq_length": 512})],
    "eval_split": [
        (0, {"data.validation_split": 0}),
        (0.5, {"data.validation_split": 0.5}),
        (1.5, "error: eval_split: data.validation_split: 1.5 is out of range"),
        (-0.1, "error: eval_split: data.validation_split: -0.1 is out of range"),
    ],
    "eval_steps": [(5, {"training.eval_steps": 5}), (7, {"training.eval_steps": 7})],
}
CASES = [(name, *case) for cases in (MLX_CASES, FORGE_CASES) for name, pairs in cases.items() for case in pairs]


def read(folder: Path, tree: Any, *words: str, environment: dict[str, str] | None = None) -> Loaded:
    """Read a tree as a JSON file, which YAML is a superset of."""
    path = folder / "mine.json"
    path.write_text(json.dumps(tree))
    return read_config(path, words, environment or {})


def value_of(config: Config, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def tree_of(names: dict[str, Any]) -> dict[str, Any]:
    """A file of the MLX schema if the names have sections, otherwise of ModelForge's."""
    if not any("." in name for name in names):
        return {**FORGE, **names}
    tree: dict[str, Any] = {"advanced": {"use_cache": True}}  # by which the schema is recognized
    for path, value in names.items():
        section, _, name = path.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


@pytest.mark.parametrize(("name", "value", "expected"), CASES, ids=lambda part: str(part)[:40])
def test_a_field_takes_effect_or_is_refused_or_reported(name: str, value: Any, expected: Any, tmp_path: Path) -> None:
    tree = tree_of({name: value})
    if isinstance(expected, str) and expected.startswith("error: "):
        with pytest.raises(UserError) as caught:
            read(tmp_path, tree)
        assert name in str(caught.value)
        assert expected.removeprefix("error: ") in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        return
    loaded = read(tmp_path, tree)
    if isinstance(expected, str):
        shown = re.sub(r"\s+", " ", "\n".join(loaded.explanation))
        assert (name in shown and expected in shown) == (expected != SAME)
    else:
        assert {path: value_of(loaded.config, path) for path in expected} == expected


def test_every_field_of_both_schemas_has_a_pair_of_values() -> None:
    assert set(MLX_CASES) == set(MLX_FIELDS)
    assert set(FORGE_CASES) == set(FORGE_FIELDS)
    assert [name for cases in (MLX_CASES, FORGE_CASES) for name, pairs in cases.items() if len(pairs) < 2] == []


# --- what a file leaves out


def test_what_an_mlx_file_leaves_out_has_the_default_of_the_schema(tmp_path: Path) -> None:
    """Except cache, device and directories, which depend on the machine, and that program's own data set."""
    tree = {section: dict(fields) for section, fields in MLX_TREE.items()}
    del tree["output"], tree["system"]["device"], tree["model"]["cache_dir"]
    whole = read(tmp_path, tree).config
    least = read(tmp_path, tree_of({"model.name": tree["model"]["name"]})).config
    assert least == whole


def test_what_a_modelforge_file_leaves_out_is_from_the_config_for_its_memory_or_the_schema(tmp_path: Path) -> None:
    for specs, file in {"low_end": "gpu_8gb", "mid_range": "gpu_12gb", "high_end": "gpu_24gb"}.items():
        config, supplied = read(tmp_path, {**FORGE, "compute_specs": specs}).config, load_file(CONFIGS / f"{file}.py")
        for path in SUPPLIED.split():
            assert value_of(config, path) == value_of(supplied, path)
        theirs = {name: value for name, value in FORGE_FIELDS.items() if name in NOT_SUPPLIED}
        assert read(tmp_path, {**FORGE, "compute_specs": specs, **theirs}).config == config
        assert (config.system.device, config.system.memory_gb, config.model.dtype) == ("auto", None, "auto")


NOT_SUPPLIED = {
    "provider", "strategy", "lora_r", "lora_alpha", "lora_dropout", "num_train_epochs", "max_grad_norm",
    "learning_rate", "weight_decay", "lr_scheduler_type", "max_steps", "warmup_ratio", "group_by_length", "packing",
    "eval_split", "eval_steps",
}  # fmt: skip


# --- names beside each other


NO_EFFECT: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"training.warmup_steps": 9, "training.warmup_ratio": 0.1},
        "training.warmup_steps",
        {"training.warmup_steps": None},
    ),
    ({"data.train_split": 0.5, "data.validation_size": 9}, "data.train_split", {"data.validation_size": 9}),
    ({"training.num_epochs": 7, "training.max_steps": 9}, "training.num_epochs", {"training.max_steps": 9}),
    (
        {"monitoring.track_gradients": False, "monitoring.gradient_log_steps": 5},
        "monitoring.gradient_log_steps",
        {"logging.gradient_steps": 0},
    ),
    (
        {"monitoring.save_metrics_plot": False, "monitoring.plot_frequency": "step"},
        "monitoring.plot_frequency",
        {"logging.plots": "none"},
    ),
    (
        {"evaluation.generate_samples": False, "evaluation.num_samples": 9},
        "evaluation.num_samples",
        {"evaluation.samples": 0},
    ),
    (
        {"training.lr_scheduler_type": "constant", "training.min_lr_ratio": 0.5},
        "training.min_lr_ratio",
        {"training.min_lr_ratio": 0.1},
    ),
    ({"use_4bit": False, "bnb_4bit_compute_dtype": "float16"}, "bnb_4bit_compute_dtype", {"model.dtype": "auto"}),
    ({"use_4bit": False, "use_8bit": True}, "use_4bit", {"quantization.bits": 8}),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup_ratio", {"training.warmup_steps": 0}),
    ({"max_steps": 5, "num_train_epochs": 2}, "num_train_epochs", {"training.max_steps": 5}),
    ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1", {"training.beta1": 0.9}),
]


@pytest.mark.parametrize(("names", "idle", "expected"), NO_EFFECT, ids=[idle for _, idle, _ in NO_EFFECT])
def test_a_name_without_effect_beside_another_is_reported(
    names: dict[str, Any], idle: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    loaded = read(tmp_path, tree_of(names))
    assert re.search(rf"\b{idle}(, [\w., ]+)?: no effect with", " ".join(" ".join(loaded.explanation).split()))
    assert {path: value_of(loaded.config, path) for path in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "qlora", "use_4bit": False}, "strategy and use_4bit: set quantization.bits to 4 and to 16"),
        ({"strategy": "qlora", "use_8bit": True, "use_4bit": False}, "strategy and use_8bit: set quantization.bits"),
        ({"use_4bit": True, "use_8bit": True}, "use_4bit and use_8bit: set quantization.bits to 4 and to 8"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16: set model.dtype"),
        ({"bf16": True, "bnb_4bit_compute_dtype": "float16"}, "bf16 and bnb_4bit_compute_dtype: set model.dtype to"),
        ({"provider": "unsloth", "max_seq_length": None}, "max_seq_length: unsloth needs a number"),
        ({"provider": "unsloth", "max_seq_length": -1}, "max_seq_length: unsloth needs a number"),
        ({"lora_rnk": 4}, "lora_rnk: no such setting in a flat file: did you mean lora_r"),
    ],
    ids=str,
)
def test_contradictions_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, {**FORGE, **changes})
    assert message in str(caught.value)


def test_the_strategy_rlhf_learns_from_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_model(tmp_path / "base")
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n}!"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": pair["prompt"]}) + "\n" for pair in pairs))
    more = ["evaluation.prompts=0", "system.device=cpu", "model.dtype=float32"]
    reward = [f"model.name={tmp_path / 'base'}", f"data.train_file={tmp_path / 'pairs.jsonl'}", "training.max_steps=2"]
    reward += ["training.objective=reward", f"output.dir={tmp_path / 'reward'}"]
    assert train.main(["configs/cpu.py", *reward, *more]) == 0
    own = {"model_name": str(tmp_path / "base"), "dataset": str(tmp_path / "prompts.jsonl"), "use_4bit": False}
    (tmp_path / "rlhf.json").write_text(json.dumps({**FORGE, **own, "strategy": "rlhf", "max_steps": 1, "fp16": False}))
    words = [str(tmp_path / "rlhf.json"), f"output.dir={tmp_path / 'run'}", *more]
    assert train.main(words) == 2
    assert "error: rl.reward: empty" in capsys.readouterr().err
    words += [f"rl.reward=run:{tmp_path / 'reward'}", "rl.max_new_tokens=8", "rl.prompts=2", "rl.group_size=2"]
    assert train.main(words) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(f"rewards/run:{tmp_path / 'reward'}" in event for event in events)


def test_the_strategy_dpo_trains_on_the_pairs_of_its_dataset(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n}!"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = {"model_name": str(tmp_path / "base"), "dataset": str(tmp_path / "pairs.jsonl"), "use_4bit": False}
    (tmp_path / "dpo.json").write_text(json.dumps({**FORGE, **own, "strategy": "dpo", "max_steps": 1, "fp16": False}))
    more = ["evaluation.prompts=0", "system.device=cpu", f"output.dir={tmp_path / 'run'}"]
    assert train.main([str(tmp_path / "dpo.json"), *more]) == 0
    assert "pair_accuracy" in json.loads((tmp_path / "run" / "report.json").read_text())["tuned"]


def test_both_trackers(tmp_path: Path) -> None:
    tree = {"logging": {"tensorboard": True, "wandb": True}}
    assert read(tmp_path, tree).config.logging.report_to == "tensorboard,wandb"


# --- warnings of the MLX schema, and its environment


@pytest.mark.parametrize(
    ("section", "name", "value", "warning"),
    [
        ("training", "batch_size", 5, "warning: batch_size=5: more than 4"),
        ("model", "max_seq_length", 4096, "warning: max_seq_length=4096: more than 2048"),
        ("lora", "rank", 65, "warning: lora.rank=65: quite large"),
        ("training", "warmup_steps", 0, "warning: learning_rate=0.0002: above 1e-4 without warm-up"),
    ],
)
def test_the_warnings_of_the_schema(section: str, name: str, value: Any, warning: str, tmp_path: Path) -> None:
    tree = {section: dict(fields) for section, fields in MLX_TREE.items()}
    assert not [line for line in read(tmp_path, tree).explanation if line.startswith("warning")]
    tree[section][name] = value
    assert [line for line in read(tmp_path, tree).explanation if line.startswith(warning)]
    fixed = {"batch_size": "training.micro_batch_size=1"}.get(name, f"{section}.{name}={MLX_TREE[section][name]}")
    assert not [line for line in read(tmp_path, tree, fixed).explanation if line.startswith("warning")]


ENVIRONMENT = {
    "BATCH_SIZE": ("3", "training.micro_batch_size", 3),
    "LEARNING_RATE": ("1e-5", "training.learning_rate", 1e-5),
    "NUM_EPOCHS": ("7", "training.num_epochs", 7),
    "LORA_RANK": ("4", "lora.rank", 4),
    "DATASET_PATH": ("other.jsonl", "data.train_file", "other.jsonl"),
    "OUTPUT_DIR": ("there", "output.dir", "there"),
}


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_names_in_the_environment_count_with_a_file_of_the_schema_only(variable: str, tmp_path: Path) -> None:
    text, path, value = ENVIRONMENT[variable]
    loaded = read(tmp_path, MLX_TREE, environment={variable: text})
    assert value_of(loaded.config, path) == value
    assert f"          {variable}={text} in the environment" in loaded.explanation
    for tree in (FORGE, {"lora": {"dropout": 0.5}}):
        assert value_of(read(tmp_path, tree, environment={variable: text}).config, path) != value
    override = f"{path}={value_of(load_file(tmp_path / 'mine.json'), path)}"
    assert value_of(read(tmp_path, MLX_TREE, override, environment={variable: text}).config, path) != value


def test_a_mistake_in_the_environment_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"BATCH_SIZE: training.micro_batch_size: 'many' is not an integer"):
        read(tmp_path, MLX_TREE, environment={"BATCH_SIZE": "many"})


# --- recognition


def test_a_schema_is_recognized_by_its_names(tmp_path: Path) -> None:
    own = {"lora": {"rank": 4}, "training": {"micro_batch_size": 3, "learning_rate": 1e-4}}
    assert read(tmp_path, own) == Loaded(Config().override(**own).override({"output.dir": "runs/mine"}))
    assert read(tmp_path, {"training": {"batch_size": 3}}).schema is MLX
    assert read(tmp_path, {"monitoring": {"track_memory": True}}).schema is MLX
    with_own_name = {"training": {"batch_size": 3}, "advanced": {"debug_mode": True}, "quantization": {"bits": 4}}
    assert read(tmp_path, with_own_name).config.quantization.bits == 4
    assert read(tmp_path, FORGE).schema is MODELFORGE
    for typo, message in (("batch_size", "training.batch_size: no such field"), ("batchsize", "training.batchsize")):
        with pytest.raises(UserError, match=message):
            read(tmp_path, {"training": {"micro_batch_size": 3, typo: 3}})


# --- inheritance and merging


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_builds_on_another(tmp_path: Path) -> None:
    write(tmp_path / "default.yaml", MLX_FILE)
    write(tmp_path / "more" / "middle.yaml", "base: ../default.yaml\nlora: {rank: 32}\ntraining: {max_steps: 5}")
    top = write(tmp_path / "more" / "top.yaml", "base: middle.yaml\ntraining: {max_steps: null, adam_beta1: 0.5}")
    config = load_file(top)
    assert (config.lora.rank, config.training.max_steps, config.training.beta1) == (32, None, 0.5)
    assert (config.model.dtype, config.lora.alpha) == ("float16", 32)


def test_several_bases_and_flat_files(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps({"lora_r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}))
    write(tmp_path / "b.json", json.dumps({"lora_r": 5, "rank_pattern": {"k_proj": 3}}))
    config = load_file(write(tmp_path / "c.yaml", "base: [a.json, b.json]\nlora_dropout: 0.5"))
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (5, 8, 0.5)
    assert config.lora.rank_pattern == {"k_proj": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: loop.yaml", "loop.yaml: base: this file builds on itself"),
        ("base: other.yaml", "other.yaml: no such config file"),
        ("base: 3", "base: \\[?3\\]? is neither a file name"),
        ("base: code.py", "code.py: base: must not name a Python file"),
    ],
)
def test_a_wrong_base_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "code.py", "raise SystemExit('ran')")
    with pytest.raises(UserError, match=message):
        load_file(write(tmp_path / "loop.yaml", text))


def test_files_merge_from_left_to_right(tmp_path: Path) -> None:
    default = write(tmp_path / "default.yaml", MLX_FILE)
    rank = write(tmp_path / "rank.yaml", "lora: {rank: 32, alpha: 64}\ntraining: {num_epochs: 5}")
    own = write(tmp_path / "own.yaml", "quantization: {bits: 4}\nlora: {rank: 8}")
    flat = write(tmp_path / "flat.json", '{"lora_r": 2}')
    config = load_config(default, [str(rank)], {})
    assert (config.lora.rank, config.lora.alpha, config.training.num_epochs) == (32, 64, 5)
    assert config.training.micro_batch_size == 2
    config = load_config(default, [str(rank), str(own), "lora.alpha=1"], {})
    assert (config.lora.rank, config.lora.alpha, config.quantization.bits) == (8, 1, 4)
    assert load_config(default, [str(own), str(flat)], {}).lora.rank == 2
    names = load_config(rank, [str(own)], {}).output.dir
    assert names == "runs/rank-own"
    assert load_config(rank, [str(own), "lora.rank=3"], {}).output.dir.startswith("runs/rank-own-")


def test_a_python_config_may_come_first(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "training: {batch_size: 7}")
    config = load_config(CONFIGS / "gpu_8gb.py", [str(mine)], {})
    assert config.training.micro_batch_size == 7
    assert config.lora.target_modules == ("all-linear",)  # of that config: the defaults of the schema do not count
    with pytest.raises(UserError, match=r"gpu_8gb.py: a Python config sets every field: name it first"):
        load_config(mine, [str(CONFIGS / "gpu_8gb.py")], {})


# --- runs

LOW = {
    **FORGE, "provider": "huggingface", "strategy": "qlora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
    "use_4bit": True, "bf16": False, "fp16": True, "num_train_epochs": 3, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16, "learning_rate": 2e-4, "max_seq_length": 512, "eval_split": 0.2,
    "eval_steps": 100,
}  # fmt: skip
MID = {k: v for k, v in LOW.items() if k != "fp16"} | {
    "provider": "unsloth", "compute_specs": "mid_range", "lora_r": 64, "lora_alpha": 128, "bf16": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_seq_length": 2048,
}  # fmt: skip
HIGH = MID | {
    "strategy": "sft", "compute_specs": "high_end", "lora_dropout": 0.05, "use_4bit": False,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_seq_length": 4096, "eval_split": 0.1,
    "eval_steps": 50,
}  # fmt: skip
MLX_CPU = {**MLX_TREE, "system": {**MLX_TREE["system"], "device": "cpu"}}


@pytest.mark.parametrize("name", ["low", "mid", "high", "full"])
def test_a_whole_file_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_model(tmp_path / "base")
    data = str(write_records(tmp_path / "data.jsonl", 64))
    tree = {"low": LOW, "mid": MID, "high": HIGH, "full": MLX_CPU}[name]
    if name == "full":
        tree["model"]["name"], tree["data"]["dataset_path"] = str(tmp_path / "base"), data
        tree["output"]["output_dir"] = str(tmp_path / "run")
    else:
        tree = {**tree, "model_name": str(tmp_path / "base"), "dataset": data}
    (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    few = ["training.max_steps=4", "evaluation.prompts=2", "logging.progress_bar=false", "system.device=cpu"]
    assert train.main([str(tmp_path / f"{name}.json"), *few, f"output.dir={tmp_path / 'run'}"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "done"] == [4]
    assert [event for event in events if event["event"] == "memory" and event.get("predicted_gb")]
    saved = load_file(tmp_path / "run" / "config.json")
    assert saved.model.dtype == {"mid": "bfloat16", "high": "bfloat16"}.get(name, "float16")
    assert saved.quantization.bits == {"low": 4, "mid": 4}.get(name, 16)
    shown = capsys.readouterr().out
    head = "MLX" if name == "full" else "ModelForge"
    assert f"config    {head} schema: " in shown
    if name == "full":
        assert "never run" in shown
        assert "warning: training.warmup_steps=100: more than 20 % of the steps" in shown


# --- the document


def test_the_document_has_a_row_for_every_field() -> None:
    """With the default of the schema; and the fields that it sets here, what is reported, and what is refused."""
    rows = {
        name: (default, here)
        for name, default, here in re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*) \|$", DOCUMENT, re.M)
    }
    assert set(rows) == set(MLX_FIELDS) | set(FORGE_FIELDS)
    for name, default in {**MLX_FIELDS, **FORGE_FIELDS}.items():
        assert rows[name][0] == ("required" if default is ... else f"`{json.dumps(default)}`"), name
    for name, value, expected in CASES:
        if isinstance(expected, dict):
            assert [path for path in expected if f"`{path}`" in rows[name][1]], name
        elif expected.startswith("error: "):
            assert "refused" in rows[name][1] or "range" in rows[name][1], name
        elif expected != SAME:
            assert expected.removesuffix(" supplies the missing settings") in rows[name][1], (name, value)
