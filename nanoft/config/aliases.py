"""Hugging Face's names for nanoft's settings, so that a flat file written for its Trainer and PEFT runs here, too.

    {"model_name": "Qwen/Qwen2.5-3B-Instruct", "use_4bit": true, "lora_r": 16, "num_train_epochs": 3, "bf16": true}

One table says what each name means. A name that is not in it is an error, and so is a value that nanoft has no
counterpart for: a run that quietly does something else than its file says is worse than none. What a file leaves out
has nanoft's default, not the Trainer's (learning_rate: 2e-4, not 5e-5).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoft import UserError

Settings = dict[str, Any]  # section.field -> value


@dataclass(frozen=True)
class Alias:
    """What a name means: a field, and its value there; a value may stand for several fields, or none: {}."""

    field: str = ""
    values: Mapping[Any, Any] | Callable[[Any], Any] | None = None  # value -> value or Settings; None: the same
    otherwise: str = ""  # what to do about any other value


def whole(number: Any) -> Any:
    """3.0 -> 3."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def steps(number: Any) -> Any:
    """-1 and 0 stand for no limit."""
    return {} if number in (-1, 0) else number


def warmup(number: Any) -> Any:
    """A number below 1 is a share of all steps."""
    return {"training.warmup_ratio": number} if isinstance(number, float) and number < 1 else whole(number)


def held_out(size: Any) -> Any:
    """A share, or a number of records."""
    return {"data.validation_size": size} if type(size) is int and size >= 1 else size


def dataset(name: Any) -> Any:
    """A name on the Hub, or a path that says so by its beginning or its end."""
    is_path = str(name).startswith((".", "/", "~", "hf://")) or str(name).rpartition(".")[2] in DATA_FILES
    return name if is_path else f"hf://datasets/{name}"


def anything(_: Any) -> Settings:
    """Nothing that would change a result here."""
    return {}


DATA_FILES = {"json", "jsonl", "csv", "tsv", "parquet"}
DTYPES = {"auto": "auto", "float32": "float32", "bfloat16": "bfloat16", "fp32": "float32", "bf16": "bfloat16"}


DTYPES |= {f"torch.{name}": name for name in ("float32", "bfloat16")}


UNDERFLOW = "float16 gradients underflow: take bfloat16"
OPTIMIZERS: dict[str, Any] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "adamw_paged",
    "paged_adamw_32bit": "adamw_paged",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "sgd": {"training.optimizer": "sgd", "training.momentum": 0.0},
}
SCHEDULES: dict[str, Any] = {
    "cosine": "cosine",
    "linear": "linear",
    "polynomial": "polynomial",
    "constant_with_warmup": "constant",
    "constant": {"training.lr_scheduler": "constant", "training.warmup_steps": 0},
}
BITS_4, BITS_8 = Alias("quantization.bits", {True: 4, False: {}}), Alias("quantization.bits", {True: 8, False: {}})
FULL = {True: "full", False: "none"}
ADAPTERS = {True: "lora", False: "full"}
LORA_ONLY = "train LoRA adapters, or every parameter"
ONE_DEVICE = "leave it out: PyTorch shares the work, without another engine"
NO_UPLOAD = "leave it out: nothing is uploaded"
ALIASES: dict[str, Alias] = {
    # Model
    "model_name": Alias("model.name"),
    "model_name_or_path": Alias("model.name"),
    "base_model": Alias("model.name"),
    "max_seq_length": Alias("model.max_seq_length"),
    "max_length": Alias("model.max_seq_length"),
    "model_max_length": Alias("model.max_seq_length"),
    "dtype": Alias("model.dtype", DTYPES, UNDERFLOW),
    "torch_dtype": Alias("model.dtype", DTYPES, UNDERFLOW),
    "bf16": Alias("model.dtype", {True: "bfloat16", False: {}}),
    "fp16": Alias(values={False: {}}, otherwise="float16 gradients underflow: set bf16=true and leave fp16 out"),
    # Quantization (BitsAndBytesConfig)
    "use_4bit": BITS_4,
    "load_in_4bit": BITS_4,
    "use_8bit": BITS_8,
    "load_in_8bit": BITS_8,
    "bnb_4bit_quant_type": Alias("quantization.type"),
    "bnb_4bit_use_double_quant": Alias("quantization.double"),
    "use_nested_quant": Alias("quantization.double"),
    "bnb_4bit_compute_dtype": Alias("model.dtype", DTYPES, UNDERFLOW),
    "bnb_4bit_quant_storage": Alias(values={"uint8": {}, "torch.uint8": {}}),
    # Adapters (LoraConfig)
    "use_peft": Alias("training.method", ADAPTERS),
    "use_lora": Alias("training.method", ADAPTERS),
    "r": Alias("lora.rank"),
    "lora_r": Alias("lora.rank"),
    "lora_alpha": Alias("lora.alpha"),
    "lora_dropout": Alias("lora.dropout"),
    "target_modules": Alias("lora.target_modules"),
    "lora_target_modules": Alias("lora.target_modules"),
    "rank_pattern": Alias("lora.rank_pattern"),
    "alpha_pattern": Alias("lora.alpha_pattern"),
    "bias": Alias("lora.bias"),
    "use_rslora": Alias("lora.rslora"),
    "use_dora": Alias("lora.dora"),
    "init_lora_weights": Alias("lora.init", {True: "default", "pissa": "pissa"}),
    "loraplus_lr_ratio": Alias("training.lora_plus_ratio"),
    "peft_type": Alias(values={"LORA": {}}, otherwise=LORA_ONLY),
    "task_type": Alias(values={"CAUSAL_LM": {}}, otherwise="nanoft trains causal language models"),
    "modules_to_save": Alias(values={}, otherwise=LORA_ONLY),
    # Data
    "train_file": Alias("data.train_file"),
    "dataset_name": Alias("data.train_file", dataset),
    "validation_file": Alias("data.validation_file"),
    "eval_file": Alias("data.validation_file"),
    "eval_split": Alias("data.validation_split", held_out),
    "validation_split": Alias("data.validation_split", held_out),
    "test_size": Alias("data.validation_split", held_out),
    "max_train_samples": Alias("data.max_samples"),
    "dataset_text_field": Alias(
        "data.columns", lambda name: {} if name == "text" else {"data.columns": {"text": name}}
    ),
    "packing": Alias("data.packing"),
    "group_by_length": Alias("data.group_by_length"),
    "train_sampling_strategy": Alias("data.group_by_length", {"random": False, "group_by_length": True}),
    "pad_to_multiple_of": Alias("data.pad_to_multiple_of"),
    "assistant_only_loss": Alias("data.train_on", {True: "assistant", False: "all"}),
    "completion_only_loss": Alias("data.train_on", {True: "assistant", False: "all"}),
    "train_on_inputs": Alias("data.train_on", {True: "all", False: "assistant"}),
    # Training (TrainingArguments)
    "per_device_train_batch_size": Alias("training.micro_batch_size"),
    "gradient_accumulation_steps": Alias("training.gradient_accumulation_steps"),
    "num_train_epochs": Alias("training.num_epochs", whole),
    "max_steps": Alias("training.max_steps", steps),
    "optim": Alias("training.optimizer", OPTIMIZERS),
    "learning_rate": Alias("training.learning_rate"),
    "lr_scheduler_type": Alias("training.lr_scheduler", SCHEDULES),
    "warmup_ratio": Alias("training.warmup_ratio"),
    "warmup_steps": Alias("training.warmup_steps", warmup),
    "weight_decay": Alias("training.weight_decay"),
    "adam_beta1": Alias("training.beta1"),
    "adam_beta2": Alias("training.beta2"),
    "adam_epsilon": Alias("training.epsilon"),
    "max_grad_norm": Alias("training.max_grad_norm"),
    "label_smoothing_factor": Alias("training.label_smoothing"),
    "neftune_noise_alpha": Alias("training.neftune_alpha"),
    "gradient_checkpointing": Alias("training.checkpointing", FULL),
    "activation_checkpointing": Alias("training.checkpointing", FULL),
    "gradient_checkpointing_kwargs": Alias(values=anything),
    "torch_compile": Alias("training.compile"),
    # When to tell, measure and save
    "logging_strategy": Alias(values={"steps": {}}, otherwise="give logging_steps"),
    "logging_steps": Alias("training.log_steps", whole),
    "report_to": Alias(
        "logging.report_to",
        {"none": "none", "tensorboard": "tensorboard", "wandb": "wandb"},
        "set one of them: every number is in metrics.jsonl anyway",
    ),
    "disable_tqdm": Alias("logging.progress_bar", {True: False, False: True}),
    "eval_strategy": Alias("training.eval_steps", {"steps": {}, "no": 0}, "give eval_steps"),
    "evaluation_strategy": Alias("training.eval_steps", {"steps": {}, "no": 0}, "give eval_steps"),
    "eval_steps": Alias("training.eval_steps", whole),
    "per_device_eval_batch_size": Alias("evaluation.batch_size"),
    "max_eval_samples": Alias("evaluation.max_samples"),
    "save_strategy": Alias("training.save_steps", {"steps": {}, "no": 0}, "give save_steps"),
    "save_steps": Alias("training.save_steps", whole),
    "save_total_limit": Alias("training.keep_checkpoints"),
    "early_stopping_patience": Alias("training.early_stopping_patience"),
    "early_stopping_threshold": Alias("training.early_stopping_threshold"),
    "load_best_model_at_end": Alias(
        values={True: {}}, otherwise="the result is always the best checkpoint: leave it out"
    ),
    "metric_for_best_model": Alias(
        values={"loss": {}, "eval_loss": {}}, otherwise="the best is that of the least loss"
    ),
    "greater_is_better": Alias(values={False: {}}, otherwise="the best is that of the least loss"),
    # Where
    "output_dir": Alias("output.dir"),
    "seed": Alias("system.seed"),
    "use_cpu": Alias("system.device", {True: "cpu", False: {}}),
    "no_cuda": Alias("system.device", {True: "cpu", False: {}}),
    "full_determinism": Alias("system.deterministic"),
    # What is so anyway, or nothing to a result
    "do_train": Alias(values={True: {}}, otherwise="eval.py measures without training"),
    "do_eval": Alias(values={True: {}}, otherwise="set eval_strategy=no to measure only at the end"),
    "resume_from_checkpoint": Alias(values={True: {}, False: {}}, otherwise="give it as --resume PATH"),
    "overwrite_output_dir": Alias(
        values={False: {}}, otherwise="a run is never overwritten: choose another output_dir"
    ),
    "trust_remote_code": Alias(values={False: {}}, otherwise="a model's own code is never run: leave it out"),
    "attn_implementation": Alias(values=anything),
    "use_cache": Alias(values=anything),
    "remove_unused_columns": Alias(values=anything),
    "dataloader_num_workers": Alias(values=anything),
    "dataloader_pin_memory": Alias(values=anything),
    "auto_find_batch_size": Alias(values=anything),
    "device_map": Alias(values={"auto": {}}, otherwise="leave it out: system.device says where"),
    "run_name": Alias(values={}, otherwise="leave it out: output_dir names the run"),
    # What is not there
    "push_to_hub": Alias(values={False: {}}, otherwise=NO_UPLOAD),
    "hub_model_id": Alias(values={}, otherwise=NO_UPLOAD),
    "deepspeed": Alias(values={"": {}}, otherwise=ONE_DEVICE),
    "fsdp": Alias(values={"": {}, False: {}}, otherwise=ONE_DEVICE),
    "tf32": Alias(values={False: {}}, otherwise="leave it out: set bf16=true to be fast"),
    "lr_scheduler_kwargs": Alias(values={}, otherwise="write sections: training.min_lr_ratio, training.lr_power"),
    "optim_args": Alias(values={}, otherwise="leave it out"),
}


def translate(flat: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """A flat file's settings as section.field -> (its name in the file, its value here); null is as if left out.

    Raises:
        UserError: an unknown name, a value without a counterpart, two names that say different things.
    """
    if flat.get("bf16") is True and flat.get("fp16") is True:
        raise UserError("bf16 and fp16: both are true: leave fp16 out")
    found: dict[str, tuple[str, Any]] = {}
    for name, value in flat.items():
        if name == "warmup_steps" and value == 0 and flat.get("warmup_ratio"):  # there, 0 leaves it to the ratio
            continue
        for field, setting in meaning(str(name), value).items():
            other, before = found.setdefault(field, (name, setting))
            if before != setting:
                raise UserError(f"{other} and {name}: set {field} to {before} and to {setting}: leave one out")
    return found


def meaning(name: str, value: Any) -> Settings:
    """What one line of a flat file sets."""
    if name not in ALIASES:
        nearest = difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.6)
        known = f"did you mean {nearest[0]}?" if nearest else "docs/configs.md lists the names; or write sections"
        raise UserError(f"{name}: no such setting in a flat file: {known}")
    alias = ALIASES[name]
    if value is None or value in ([], {}):
        return {}
    setting = alias.values(value) if callable(alias.values) else value
    if isinstance(alias.values, Mapping):
        one = value[0] if isinstance(value, list) and len(value) == 1 else value  # report_to: [none]
        if isinstance(one, (list, dict)) or one not in alias.values:
            known = f"is none of {', '.join(map(str, alias.values))}" if alias.values else "has no counterpart"
            raise UserError(f"{name}: {value!r:.60} {known}" + (f": {alias.otherwise}" if alias.otherwise else ""))
        setting = alias.values[one]
    return setting if isinstance(setting, dict) and alias.values is not None else {alias.field: setting}
