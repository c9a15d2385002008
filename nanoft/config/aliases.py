"""Hugging Face's names for nanoft's settings: a flat file written for the Trainer and PEFT runs here unchanged.

    {"model_name": "Qwen/Qwen2.5-3B-Instruct", "use_4bit": true, "lora_r": 16, "num_train_epochs": 3, "bf16": true}

`ALIASES` maps each name: it sets fields, is refused, or has no counterpart here, which is reported with the reason. An
unknown name is an error. A field that a file does not set keeps nanoft's default, not the Trainer's (learning_rate:
2e-4, not 5e-5). `schemas.py` adds the tables of two other schemas.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoft import UserError
from nanoft.config.settings import FIELDS

Settings = dict[str, Any]  # section.field -> value


class Note(str):
    """Why a value has no counterpart here: it sets nothing and is reported."""


@dataclass(frozen=True)
class Alias:
    """The field that a name sets, and its value there; one value can set several fields, or none: {} or a Note."""

    field: str = ""
    # value -> value, Settings or Note; None: unchanged. A function raises a ValueError that states the valid values
    values: Mapping[Any, Any] | Callable[[Any], Any] | None = None
    fix: str = ""  # what to do about any other value
    open: bool = False  # other values pass unchanged: `validate_config` checks them


class Rule(NamedTuple):
    """`names` have no effect when `applies(value of one of others, own value)` holds."""

    names: str
    others: str
    applies: Callable[[Any, Any], Any]


def whole(number: Any) -> Any:
    """3.0 -> 3."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def warmup(number: Any) -> Any:
    """A number below 1 is a share of all steps."""
    return {"training.warmup_ratio": number} if isinstance(number, float) and number < 1 else whole(number)


def held_out(size: Any) -> Any:
    """A share, or a number of records."""
    return {"data.validation_size": size} if type(size) is int and size >= 1 else size


def dataset(name: Any) -> Any:
    """A name on the Hub, unless it begins or ends like a path."""
    is_path = str(name).startswith((".", "/", "~", "hf://")) or str(name).rpartition(".")[2] in DATA_FILES
    return name if is_path else f"hf://datasets/{name}"


def pairs(text: str) -> dict[str, str]:
    """'a=b c=d' -> {a: b, c: d}."""
    return dict(pair.split("=") for pair in text.split())


def noted(why: str, *same: Any) -> Alias:
    """No value has a counterpart, except those in `same`, which describe what nanoft does anyway."""
    return Alias(values=lambda value: {} if value in same else Note(why))


DATA_FILES = {"json", "jsonl", "csv", "tsv", "parquet"}
DTYPES = {"auto": "auto", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
DTYPES |= {f"torch.{name}": DTYPES[name] for name in ("float32", "bfloat16", "float16", "half")}
OPTIMIZERS: dict[str, Any] = {  # whose names differ
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "adamw_paged",
    "paged_adamw_32bit": "adamw_paged",
    "paged_adamw_8bit": "adamw_8bit_paged",
    "sgd": {"training.optimizer": "sgd", "training.momentum": 0.0},
}
SCHEDULES: dict[str, Any] = {
    "warmup_stable_decay": "wsd",
    "constant_with_warmup": "constant",
    "constant": {"training.lr_scheduler": "constant", "training.warmup_steps": 0},
}
OBJECTIVES: dict[str, Any] = {name: {"training.objective": name} for name in ("dpo", "kto", "orpo", "simpo")}
STRATEGY = {"steps": {}, "no": 0, "epoch": "epoch"}
ORDERS: dict[str, Any] = {"random": False, "group_by_length": True, "sequential": {"training.shuffle": False}}
LEVELS: dict[str, Any] = {name: name for name in ("debug", "info", "warning", "error")}
LEVELS |= {name.upper(): name for name in LEVELS} | {"passive": {}, "critical": "error"}
LOWEST_LOSS = "the best checkpoint has the lowest loss"
LORA_OR_FULL = "train LoRA adapters, or every parameter"
TORCHRUN = "remove it: start train.py with torchrun, and set training.sharding=full to shard"
NO_UPLOAD = "remove it: nothing is uploaded"
NO_RESULT = noted("changes no result here")

# Fields that have the same name there
SAME_NAME = """
    model.max_seq_length model.cache_dir lora.target_modules lora.rank_pattern lora.alpha_pattern lora.bias
    lora.modules_to_save data.train_file
    data.validation_file data.packing data.group_by_length data.pad_to_multiple_of training.gradient_accumulation_steps
    training.learning_rate training.warmup_ratio training.weight_decay training.max_grad_norm
    training.early_stopping_patience training.early_stopping_threshold system.seed
    preference.beta preference.label_smoothing preference.desirable_weight preference.undesirable_weight
"""
# name=field: other names that mean the same, with the same values
RENAMED = """
    model_name=model.name model_name_or_path=model.name base_model=model.name max_length=model.max_seq_length
    model_max_length=model.max_seq_length bnb_4bit_quant_type=quantization.type
    bnb_4bit_use_double_quant=quantization.double use_nested_quant=quantization.double r=lora.rank lora_r=lora.rank
    lora_alpha=lora.alpha lora_dropout=lora.dropout lora_target_modules=lora.target_modules use_rslora=lora.rslora
    use_dora=lora.dora eval_file=data.validation_file max_train_samples=data.max_samples
    loraplus_lr_ratio=training.lora_plus_ratio per_device_train_batch_size=training.micro_batch_size
    num_train_epochs=training.num_epochs adam_beta1=training.beta1 adam_beta2=training.beta2
    adam_epsilon=training.epsilon label_smoothing_factor=training.label_smoothing
    neftune_noise_alpha=training.neftune_alpha torch_compile=training.compile
    save_total_limit=training.keep_checkpoints rl_beta=preference.beta orpo_alpha=preference.beta
    dpo_label_smoothing=preference.label_smoothing rpo_alpha=preference.sft_weight simpo_gamma=preference.gamma
    kto_desirable_weight=preference.desirable_weight kto_undesirable_weight=preference.undesirable_weight
    eval_on_start=evaluation.on_start per_device_eval_batch_size=evaluation.batch_size
    max_eval_samples=evaluation.max_samples output_dir=output.dir full_determinism=system.deterministic
"""
# names (separated by spaces) -> what they mean
TRANSLATED = {
    # Model and quantization (BitsAndBytesConfig)
    "dtype torch_dtype bnb_4bit_compute_dtype": Alias("model.dtype", DTYPES),
    "bf16": Alias("model.dtype", {True: "bfloat16", False: {}}),
    "fp16": Alias("model.dtype", {True: "float16", False: {}}),
    "use_4bit load_in_4bit": Alias("quantization.bits", {True: 4, False: {}}),
    "use_8bit load_in_8bit": Alias("quantization.bits", {True: 8, False: {}}),
    "bnb_4bit_quant_storage": Alias(values={"uint8": {}, "torch.uint8": {}}),
    # Adapters (LoraConfig)
    "use_peft use_lora": Alias("training.method", {True: "lora", False: "full"}),
    "init_lora_weights": Alias("lora.init", {True: "default"}, open=True),
    "peft_type": Alias(values={"LORA": {}}, fix=LORA_OR_FULL),
    "task_type": Alias(values={"CAUSAL_LM": {}}, fix="nanoft trains causal language models"),
    # Data
    "dataset_name": Alias("data.train_file", dataset),
    "eval_split validation_split test_size": Alias("data.validation_split", held_out),
    "dataset_text_field": Alias(
        "data.columns", lambda name: {"data.columns": {"text": name}} if name != "text" else {}
    ),
    "train_sampling_strategy": Alias("data.group_by_length", ORDERS),
    "assistant_only_loss completion_only_loss": Alias("data.train_on", {True: "assistant", False: "all"}),
    "train_on_inputs": Alias("data.train_on", {True: "all", False: "assistant"}),
    # Training (TrainingArguments)
    "max_steps": Alias("training.max_steps", {-1: {}, 0: {}}, open=True),  # no limit
    "optim": Alias("training.optimizer", OPTIMIZERS, open=True),
    "lr_scheduler_type": Alias("training.lr_scheduler", SCHEDULES, open=True),
    "warmup_steps": Alias("training.warmup_steps", warmup),
    "gradient_checkpointing activation_checkpointing": Alias("training.checkpointing", {True: "full", False: "none"}),
    "logging_strategy": Alias("training.log_steps", STRATEGY, "set logging_steps"),
    "log_level": Alias("logging.level", LEVELS),
    "logging_steps": Alias("training.log_steps", whole),
    "report_to": Alias("logging.report_to"),
    "disable_tqdm": Alias("logging.progress_bar", {True: False, False: True}),
    "eval_strategy evaluation_strategy": Alias("training.eval_steps", STRATEGY, "set eval_steps"),
    "eval_steps": Alias("training.eval_steps", whole),
    "save_strategy": Alias("training.save_steps", STRATEGY | {"best": 0}, "set save_steps"),
    "save_steps": Alias("training.save_steps", whole),
    "load_best_model_at_end": Alias(values={True: {}}, fix="remove it: the result is always the best checkpoint"),
    "metric_for_best_model": Alias(values={"loss": {}, "eval_loss": {}}, fix=LOWEST_LOSS),
    "greater_is_better": Alias(values={False: {}}, fix=LOWEST_LOSS),
    "use_cpu no_cuda": Alias("system.device", {True: "cpu", False: {}}),
    # Preferences (DPOConfig, KTOConfig, CPOConfig)
    "rl": Alias(values=OBJECTIVES | {"ipo": {"training.objective": "dpo", "preference.loss": "ipo"}}),
    "loss_type": Alias("preference.loss", {name: name for name in ("sigmoid", "robust", "ipo")} | OBJECTIVES),
    # What nanoft does anyway, or what changes no result
    "do_train": Alias(values={True: {}}, fix="eval.py evaluates without training"),
    "do_eval": Alias(values={True: {}}, fix="set eval_strategy=no to evaluate only at the end"),
    "resume_from_checkpoint": Alias(values={True: {}, False: {}}, fix="use --resume PATH"),
    "overwrite_output_dir": Alias(values={False: {}}, fix="a run is never overwritten: choose another output_dir"),
    "trust_remote_code": Alias(values={False: {}}, fix="remove it: code that comes with a model is never run"),
    "gradient_checkpointing_kwargs attn_implementation use_cache remove_unused_columns": NO_RESULT,
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers": NO_RESULT,
    "dataloader_drop_last dataset_num_proc dataset_batch_size auto_find_batch_size eval_accumulation_steps": NO_RESULT,
    "logging_first_step logging_nan_inf_filter log_level_replica skip_memory_metrics": NO_RESULT,
    "include_num_input_tokens_seen include_tokens_per_second torch_empty_cache_steps ddp_timeout": NO_RESULT,
    "ddp_find_unused_parameters local_rank save_on_each_node label_names prediction_loss_only": NO_RESULT,
    "data_seed": noted("seed also seeds the order of the data"),
    "run_name": noted("output_dir names the run"),
    "logging_dir": noted("trackers write into output_dir"),
    "save_safetensors": noted("every weight is saved as safetensors", True),
    "save_only_model": noted("a checkpoint holds what a resumed run needs", False),
    "device_map": Alias(values={"auto": {}}, fix="remove it: system.device chooses the device"),
    # What nanoft does not have
    "push_to_hub": Alias(values={False: {}}, fix=NO_UPLOAD),
    "hub_model_id": Alias(values={}, fix=NO_UPLOAD),
    "deepspeed": Alias(values={"": {}}, fix=TORCHRUN),
    "fsdp": Alias(values={"": {}, False: {}}, fix=TORCHRUN),
    "tf32": Alias(values={False: {}}, fix="remove it: set bf16=true for speed"),
    "lr_scheduler_kwargs": Alias(values={}, fix="write a file with sections and set training.lr_* and min_lr_ratio"),
    "optim_args": Alias(values={}, fix="remove it"),
}
ALIASES = {field.partition(".")[2]: Alias(field) for field in SAME_NAME.split()}
ALIASES |= {name: Alias(field) for name, field in pairs(RENAMED).items()}
ALIASES |= {name: alias for names, alias in TRANSLATED.items() for name in names.split()}
SHORT = {"lr": "training.learning_rate", "epochs": "training.num_epochs", "batch_size": "training.micro_batch_size"}


FOUR_BIT = "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant use_nested_quant"
RULES = [
    Rule("warmup_steps", "warmup_ratio", lambda other, own: other and own == 0),  # 0 means: use the ratio
    Rule("warmup_ratio", "lr_scheduler_type", lambda other, own: other == "constant"),
    Rule(FOUR_BIT, "use_4bit load_in_4bit", lambda other, own: other is False),
    Rule(FOUR_BIT, "use_8bit load_in_8bit", lambda other, own: other is True),
    Rule("eval_steps", "eval_strategy evaluation_strategy", lambda other, own: other == "epoch"),
    Rule("save_steps", "save_strategy", lambda other, own: other in ("epoch", "best")),
    Rule("logging_steps", "logging_strategy", lambda other, own: other == "epoch"),
    Rule("num_train_epochs", "max_steps", lambda other, own: other not in (None, 0, -1)),
    Rule("adam_beta1 adam_beta2 adam_epsilon", "optim", lambda other, own: other == "sgd"),
    Rule("early_stopping_threshold", "early_stopping_patience", lambda other, own: not other),
]


def translate(
    file: Mapping[str, Any], table: Mapping[str, Alias], rules: Iterable[Rule], where: str
) -> dict[str, Settings | Note]:
    """What each name sets, or why it sets nothing; null is the same as no setting. `where` is for error messages."""
    idle = {
        name: Note(f"no effect with {other}: {json.dumps(file.get(other), default=str)}")
        for rule in rules
        for name, other in itertools.product(rule.names.split(), rule.others.split())
        if file.get(name) is not None and rule.applies(file.get(other), file[name])
    }
    return {name: idle.get(name) or _meaning(str(name), value, table, where) for name, value in file.items()}


def settle(meanings: Mapping[str, Settings | Note]) -> dict[str, tuple[str, Any]]:
    """section.field -> (name in the file, value); a UserError if two names set a field to different values."""
    found: dict[str, tuple[str, Any]] = {}
    for name, meaning in meanings.items():
        for field, setting in meaning.items() if isinstance(meaning, dict) else ():
            other, before = found.setdefault(field, (name, setting))
            if field == "logging.report_to" and before != setting:
                found[field] = (name, f"{before},{setting}")
            elif before != setting:
                both = f"{other} and {name}: set {field} to {before} and to {setting}"
                raise UserError(f"{both}: remove one of them")
    return found


def _meaning(name: str, value: Any, table: Mapping[str, Alias], where: str) -> Settings | Note:
    """What one line of a file sets."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.6)
        known = f"did you mean {near[0]}?" if near else "docs/configs.md lists the names; or write sections"
        raise UserError(f"{name}: no such setting {where}: {known}")
    alias = table[name]
    if value is None or value in ([], {}):
        return {}
    try:
        setting = alias.values(value) if callable(alias.values) else value
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {value!r:.60} {error}") from None
    if isinstance(alias.values, Mapping):
        one = value[0] if isinstance(value, list) and len(value) == 1 else value  # lr_scheduler_type: [linear]
        if isinstance(one, (list, dict)) or (one not in alias.values and not alias.open):
            options = f"is not one of {', '.join(map(str, alias.values))}" if alias.values else "has no counterpart"
            raise UserError(f"{name}: {value!r:.60} {options}" + (f": {alias.fix}" if alias.fix else ""))
        setting = alias.values.get(one, one)
    is_meaning = isinstance(setting, Note) or (isinstance(setting, dict) and setting is not value)
    return setting if is_meaning else {alias.field: setting}


def suggest_override(name: str) -> str | None:
    """The section.field that a name such as `lr` or `max-steps` most likely means; None if nothing is near."""
    name = name.replace("-", "_")
    meanings = {alias: known.field for alias, known in ALIASES.items() if known.field} | SHORT
    meanings |= {field: path for path, field in reversed(FIELDS.items())} | {path: path for path in FIELDS}
    nearest = difflib.get_close_matches(name, meanings, n=1, cutoff=0.75)
    return meanings[nearest[0]] if nearest else None
