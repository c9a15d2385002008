"""Every setting of a run, in one typed tree.

A config is a value: frozen dataclasses, one per concern, that check themselves when they are made and never change.
A config file is a small Python module that defines `config`, or YAML/JSON with the same sections, or a flat one with
Hugging Face's names (nanoft/aliases.py); one builds on another with `base.override({"training.learning_rate": 1e-4})`.
Later sources win: the file, then the environment (`NANOFT_TRAINING__MAX_STEPS=20`), then the command line
(`training.max_steps=20`). A name that does not exist is an error with the nearest name that does, because a misspelled
setting that is silently ignored costs a GPU day.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from nanoft import UserError
from nanoft.aliases import ALIASES, translate
from nanoft.untrusted import parse_json, parse_yaml, read_bytes, redact

Shape = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "summarization",
    "extractive_qa", "text",
]  # fmt: skip
Optimizer = Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged", "sgd"]
ENVIRONMENT_PREFIX = "NANOFT_"
NAMES = r"[\[(]?[\w.:-]+([,\s]+[\w.:-]+)*[\])]?"  # q_proj,v_proj
FUNCTION = re.compile(r"(?!regex:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function, a metric of the user's own


def between(default: Any, low: float, high: float = math.inf) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


class Section:
    """Base of the section dataclasses: checks types and ranges when an instance is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            name = f"{SECTION_NAMES[type(self).__name__]}.{item.name}"
            _check_type(name, value, hints[item.name])
            if redact(repr(value)) != repr(value):  # a run's config.json is for everyone
                raise UserError(f"{name}: holds an access token: take it out, and set HF_TOKEN or WANDB_API_KEY")
            low, high = item.metadata.get("low", -math.inf), item.metadata.get("high", math.inf)
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, (int, float)) and not low <= number <= high:
                    wanted = f">= {low}" if high == math.inf else f"between {low} and {high}"
                    raise UserError(f"{name}: {number} is out of range: it must be {wanted}")


@dataclass(frozen=True)
class ModelConfig(Section):
    name: str = ""  # Hub name or directory in the Hugging Face layout
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute dtype; auto: bfloat16 where it is fast
    max_seq_length: int = between(2048, 8)  # tokens; longer samples are truncated or dropped (data.truncation)
    random_init: bool = False  # start from random weights: pre-train from config.json and tokenizer alone


@dataclass(frozen=True)
class LoRAConfig(Section):
    rank: int = between(16, 1, 4096)  # width r of the update B A
    alpha: float = between(32.0, 1e-6)  # the update is scaled by alpha / rank
    dropout: float = between(0.0, 0.0, 0.99)  # probability, on the adapter's input only
    target_modules: tuple[str, ...] = ("all-linear",)  # or attention, mlp, names (q_proj), regular expressions
    # By module, for names or regular expressions; the first that fits:
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"low": 1, "high": 4096})  # {q_proj: 8}
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"low": 1e-6})  # {q_proj: 16}
    rslora: bool = False  # scale by alpha / sqrt(rank), so that a higher rank learns as fast (rsLoRA)
    dora: bool = False  # learn the length of each row of the weight by itself (DoRA)
    freeze_a: bool = False  # train B only (LoRA-FA)
    init: Literal["default", "pissa"] = "default"  # pissa: begin with the weight's principal directions (PiSSA)
    bias: Literal["none", "all", "lora_only"] = "none"  # train all biases, or those of linears with adapters


@dataclass(frozen=True)
class QuantizationConfig(Section):
    bits: Literal[4, 8, 16] = 16  # frozen linears in 4 (QLoRA) or 8 bits; 16: as they are in model.dtype
    type: Literal["nf4", "fp4"] = "nf4"  # the 4-bit code book
    double: bool = True  # 4 bits: quantise the scales of the blocks too: 0.37 bit less per weight
    dequantize: Literal["auto", "per_use", "cached"] = "auto"  # at each use, or once; auto: if a GPU has room, once


@dataclass(frozen=True)
class DataConfig(Section):
    # What is read
    train_file: str = ""  # file, directory, glob or hf://datasets/owner/name; several by commas
    weights: tuple[float, ...] = ()  # how often each of several train_files is seen in an epoch; empty: once
    validation_file: str | None = None  # none: split from train_file
    format: Shape = "auto"  # shape of the records; auto: told from them
    columns: dict[str, str] = field(default_factory=dict)  # {instruction: q}: name here -> name in the file
    delimiter: str | None = None  # of CSV files; none: found in the header
    label_field: str | None = None  # keep only records that this field calls desirable (true, 1, good, ...)
    max_samples: int | None = between(None, 1)  # keep only the first so many records of each file
    # What is kept
    max_bad_records: float = between(0.05, 0.0, 1.0)  # share of malformed records above which the run stops
    deduplicate: bool = True  # leave out records that say exactly what an earlier one says
    near_duplicates: float | None = between(None, 0.3, 1.0)  # leave out records with this share of 5-grams in common
    near_leaks: Literal["warn", "remove", "ignore"] = "warn"  # prompts that nearly stand in the validation data
    min_characters: int = between(1, 1)  # of all messages of a record together
    max_characters: int | None = between(None, 1)  # the same, at most
    min_tokens: int = between(1, 1)  # of a sample
    # What is held out, when there is no validation_file
    validation_split: float = between(0.05, 0.0, 0.9)  # share of the prompts
    validation_size: int | None = between(None, 1)  # so many records instead of a share
    split_stratify: str | None = None  # a field, or `length`: each of its values gives its share; none: label_field
    split_group: str | None = None  # a field: records with the same value stay on one side
    split_time: str | None = None  # a field with dates or numbers: the newest records are held out
    # What becomes of it
    template_args: dict[str, Any] = field(default_factory=dict)  # more for the chat template: {enable_thinking: false}
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"  # whose tokens are targets
    truncation: Literal["drop", "prompt", "response", "proportional", "reject"] = "drop"  # of over-long samples
    packing: bool = False  # several short samples in one row; they never attend to each other
    group_by_length: bool = False  # rows of like length together, so that batches pad little
    pad_to_multiple_of: int = between(1, 1, 1024)  # widths of micro-batches are rounded up to it


@dataclass(frozen=True)
class TrainingConfig(Section):
    method: Literal["lora", "full"] = "lora"  # train adapters, or every parameter
    micro_batch_size: int | Literal["auto"] = between(4, 1)  # rows per forward pass; auto: as many as fit into memory
    gradient_accumulation_steps: int = between(4, 1)  # micro-batches per optimizer step; with auto: rows of a step
    num_epochs: int = between(3, 1)  # passes over the training data
    max_steps: int | None = between(None, 1)  # stop after so many optimizer steps, whatever num_epochs says
    optimizer: Optimizer = "adamw"  # 8bit: moments in 8 bits; paged: moments move to the CPU when the GPU is full
    learning_rate: float = between(2e-4, 0.0)  # peak
    lora_plus_ratio: float = between(1.0, 1.0)  # B learns so many times as fast as A (LoRA+); 16 is usual
    lr_scheduler: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"  # shape after the warm-up
    lr_power: float = between(1.0, 0.0)  # of polynomial: (1 - t)^power
    warmup_ratio: float = between(0.03, 0.0, 1.0)  # share of the steps spent on linear warm-up
    warmup_steps: int | None = between(None, 0)  # if given, beats warmup_ratio
    min_lr_ratio: float = between(0.0, 0.0, 1.0)  # the schedule ends at learning_rate * min_lr_ratio
    weight_decay: float = between(0.0, 0.0)  # decoupled (sgd: added to the gradient); matrices only
    beta1: float = between(0.9, 0.0, 0.99999)  # decay of the gradient's running mean
    beta2: float = between(0.999, 0.0, 0.99999)  # decay of its running square
    epsilon: float = between(1e-8, 0.0)  # added to the root of the running square
    momentum: float = between(0.9, 0.0, 0.99999)  # of sgd, which knows neither beta nor epsilon
    max_grad_norm: float = between(1.0, 0.0)  # clip the global gradient norm to this; 0: no clipping
    label_smoothing: float = between(0.0, 0.0, 0.99)  # probability spread evenly over the vocabulary
    z_loss: float = between(0.0, 0.0, 1.0)  # weight of the squared log-normaliser; 1e-4 where it is used
    neftune_alpha: float = between(0.0, 0.0)  # uniform noise on the embeddings while training (NEFTune); 5 is usual
    checkpointing: Literal["auto", "none", "every_k", "full", "offload"] = "auto"  # activations computed again
    checkpoint_every: int = between(2, 1)  # with every_k: of so many blocks, the activations of one are computed again
    sharding: Literal["none", "full"] = "none"  # full: weights, gradients and moments split over the ranks (torchrun)
    compile: bool = False  # compile each block: worth its minute on CUDA; a CPU needs a C++ compiler for it
    log_steps: int = between(10, 1)  # optimizer steps between two `train` lines of metrics.jsonl
    eval_steps: int = between(100, 0)  # optimizer steps between evaluations; 0: only at the end
    save_steps: int = between(500, 0)  # optimizer steps between checkpoints; 0: only at the end
    keep_checkpoints: int = between(3, 1)  # the newest so many, and the best
    early_stopping_patience: int = between(0, 0)  # stop after so many evaluations without improvement; 0: never
    early_stopping_threshold: float = between(0.0, 0.0)  # what counts as improvement, in nats per target token
    keep_every: int = between(0, 0)  # and those of steps that are multiples of this, for good; 0: no others


@dataclass(frozen=True)
class GuardConfig(Section):
    """What happens when a loss or gradient is not finite, or far above those before."""

    max_skips: int = between(5, 1)  # windows left out in a row before the run goes back to its last checkpoint
    max_rollbacks: int = between(3, 0)  # so often; then it ends with exit code 3
    rollback_rate: float = between(0.5, 0.001, 1.0)  # factor on the learning rate at each rollback
    on_spike: Literal["warn", "skip", "rollback"] = "warn"  # the strongest measure against a spike
    spike_score: float = between(10.0, 1.0)  # robust deviations above the median that make a spike
    spike_window: int = between(100, 20)  # steps that it is compared with


@dataclass(frozen=True)
class OutputConfig(Section):
    dir: str = ""  # run directory; empty: runs/<config name>, plus a hash of the overrides if there are any


@dataclass(frozen=True)
class LoggingConfig(Section):
    progress_bar: bool = True  # a tqdm bar on stderr
    show_example: bool = True  # print one training sample with its target tokens marked
    plots: Literal["none", "end", "epoch", "step"] = "none"  # when to draw the curves in plots/; step: each logged one
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # who is told besides metrics.jsonl; wandb: offline
    gradient_steps: int = between(0, 0)  # optimizer steps between two looks at the gradients by module; 0: none


@dataclass(frozen=True)
class SystemConfig(Section):
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    seed: int = between(0, 0, 2**32 - 1)  # data order, adapter initialisation, dropout
    deterministic: bool = False  # deterministic CUDA kernels (slower); the CPU always is
    threads: int = between(0, 0)  # CPU threads; 0: PyTorch's choice
    memory_gb: float | None = between(None, 0.1)  # of the device, for --plan where it is not; where it is, it counts
    ranks: int = between(1, 1)  # processes that share each optimizer step: as many as torchrun starts
    profile: bool = False  # record a few steps into profile/, and the operators that take the time
    kernels: Literal["auto", "plain"] = "auto"  # plain: only the core's own formulas, slower and with more memory
    debug: bool = False  # stop at the operation whose gradient is NaN, and name it (several times slower)


@dataclass(frozen=True)
class EvaluationConfig(Section):
    batch_size: int = between(16, 1)  # rows per forward pass
    max_samples: int | None = between(None, 1)  # evaluate the loss on at most so many validation samples
    prompts: int = between(200, 0)  # held-out prompts answered by base and tuned at the end; 0: none
    prompt_batch_size: int = between(64, 1)  # prompts answered at once
    max_new_tokens: int = between(128, 1)  # per answer
    temperature: float = between(0.0, 0.0)  # of the answers; 0: always the most likely token
    top_k: int = between(0, 0)  # with a temperature: among so many of the likeliest tokens; 0: all
    top_p: float = between(1.0, 1e-6, 1.0)  # with a temperature: among the likeliest tokens with this probability
    min_p: float = between(0.0, 0.0, 1.0)  # with a temperature: among tokens with this share of the likeliest one's
    repetition_penalty: float = between(1.0, 0.01)  # makes tokens that were there less likely; 1: it does not
    metrics: tuple[str, ...] = ()  # of the answers, besides exact match: docs/evaluation.md; the first decides who wins
    by_field: str | None = None  # a field of the records: perplexity for each of its values
    stride: int | None = between(None, 1)  # of the windows over texts longer than the context; none: half the context
    samples: int = between(3, 0)  # answers shown side by side


@dataclass(frozen=True)
class Config:
    """One run: every section, checked alone and against the others."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.training.method == "full" and self.quantization.bits != 16:
            raise UserError(
                f"quantization.bits: {self.quantization.bits} freezes the base, and training.method=full trains it: "
                "set quantization.bits=16 or training.method=lora"
            )
        if self.training.sharding == "full":
            self._check_sharding()
        if self.model.random_init and self.training.method != "full":
            raise UserError("model.random_init: an adapter on random weights learns nothing: set training.method=full")
        if self.training.lora_plus_ratio != 1 and self.training.method != "lora":
            raise UserError("training.lora_plus_ratio: there is no B to speed up: set it to 1 or training.method=lora")
        if self.logging.gradient_steps and self.training.sharding == "full":
            raise UserError("logging.gradient_steps: gradients are split by training.sharding=full: set it to 0")
        if not self.lora.target_modules:
            raise UserError("lora.target_modules: empty: name at least one module, for example q_proj,v_proj")
        check_expressions(self.lora)
        if self.lora.init == "pissa" and max([self.lora.rank, *self.lora.rank_pattern.values()]) > 2048:
            raise UserError("lora.init: pissa is saved as a LoRA of twice its rank: set lora.rank to 2048 at most")
        if self.data.validation_file and self.data.validation_file == self.data.train_file:
            raise UserError("data.validation_file: the same file as data.train_file: leave it out to split that file")
        if self.data.split_time and (self.data.split_group or self.data.split_stratify):
            raise UserError("data.split_time: holds out the newest records: leave split_group and split_stratify out")
        if self.evaluation.stride and self.evaluation.stride >= self.model.max_seq_length:
            raise UserError(
                f"evaluation.stride: {self.evaluation.stride}: windows of model.max_seq_length="
                f"{self.model.max_seq_length} tokens must overlap: make it smaller"
            )
        if any(not 0 <= weight <= 100 for weight in self.data.weights):
            raise UserError(f"data.weights: {self.data.weights}: a weight is how often a file is seen: from 0 to 100")
        try:
            json.dumps([self.data.template_args, self.data.columns])
        except (TypeError, ValueError):
            raise UserError("data.template_args: a value is no text, number, true, false, list or table") from None

    def _check_sharding(self) -> None:
        """FSDP2 splits parameters of one tensor each, and bitsandbytes keeps packed weights and moments elsewhere."""
        if self.quantization.bits != 16:
            raise UserError(
                f"quantization.bits: {self.quantization.bits}: packed weights are no parameters that can be split: "
                "set quantization.bits=16 (each of N processes holds an Nth of it) or training.sharding=none"
            )
        if self.training.optimizer not in ("adamw", "sgd"):
            raise UserError(
                f"training.optimizer: {self.training.optimizer} cannot split its state: set training.optimizer=adamw "
                "(each of N processes holds an Nth of it) or training.sharding=none"
            )
        if self.training.compile:
            raise UserError("training.compile: not with training.sharding=full: set one of them back")

    def override(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with `section.field` keys replaced; strings are parsed by the field's type.

        Raises:
            UserError: unknown name, wrong type, value out of range, or a combination that cannot work.
        """
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, name, hint = _find_field(key)
            by_section.setdefault(section, {})[name] = _parse(key, value, hint) if isinstance(value, str) else value
        sections = {s: dataclasses.replace(getattr(self, s), **_listed(changed)) for s, changed in by_section.items()}
        return dataclasses.replace(self, **sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The tree as plain JSON values; `Config.from_dict` gives an equal config back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """Build a config from nested sections, as in YAML or JSON."""
        changes: dict[str, Any] = {}
        for section, fields in tree.items():
            if section not in SECTION_TYPES:
                raise UserError(f"{section}: no such section{_nearest(str(section), SECTION_TYPES)}")
            if not isinstance(fields, Mapping):
                raise UserError(f"{section}: {fields!r:.100} is not a table of fields")
            changes.update({f"{section}.{name}": value for name, value in fields.items()})
        return cls().override(changes)

    def effective_batch_size(self) -> int:
        """Rows per optimizer step, on all ranks together."""
        return self.micro_batch_rows() * self.training.gradient_accumulation_steps * self.system.ranks

    def micro_batch_rows(self) -> int:
        """Rows per forward pass; 1 as long as `auto` has not been decided."""
        size = self.training.micro_batch_size
        return 1 if size == "auto" else size


def check_expressions(lora: LoRAConfig) -> None:
    """Every name of a module may be a regular expression, and must be a valid one.

    Raises:
        UserError: names the first that is not.
    """
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        for expression in getattr(lora, name):
            try:
                re.compile(expression)
                re.compile(rf"(.*\.)?({expression})$")  # as a pattern's key is used
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(f"lora.{name}: {expression!r:.100} is not a regular expression: {error}") from None


# What may differ when a run goes on: none of it changes what the steps already taken did.
MAY_CHANGE_ON_RESUME = {
    "training.num_epochs": "where the run ends",
    "training.max_steps": "where the run ends",
    "training.log_steps": "what is told",
    "training.eval_steps": "what is told",
    "training.save_steps": "what is kept",
    "training.keep_checkpoints": "what is kept",
    "training.keep_every": "what is kept",
    "training.early_stopping_patience": "where the run ends",
    "training.early_stopping_threshold": "where the run ends",
    "training.checkpointing": "when activations are computed, not which",
    "training.checkpoint_every": "when activations are computed, not which",
    "training.sharding": "where the weights lie",
    "quantization.dequantize": "when weights are unpacked, not to what",
    "system.device": "where it is computed",
    "system.memory_gb": "what a plan goes by",
    "system.profile": "what is told",
    "system.debug": "what is told",
    "output.dir": "where it lies",
    "guard": "what happens next time",
    "evaluation": "what is measured",
    "logging": "what is shown",
}
KEPT = {"evaluation.max_samples"}  # of what may change, this may not: the best loss so far is on those samples
# Why the others may not, by section.
WHY_NOT = {
    "model": "other weights, or computed otherwise",
    "lora": "the adapter would have another shape, scale or beginning",
    "quantization": "the adapter corrects another base",
    "data": "other samples, or in another order",
    "training": "the steps already taken would have been others",
    "evaluation": "the best loss so far was measured on other samples",
    "system": "order, dropout or rounding would be others",
}
SPLIT = (  # only their product counts
    "training.micro_batch_size",
    "training.gradient_accumulation_steps",
    "system.ranks",
)

SECTION_TYPES: dict[str, type] = typing.get_type_hints(Config)
SECTION_NAMES: dict[str, str] = {hint.__name__: name for name, hint in SECTION_TYPES.items()}


def settled(config: Config) -> dict[str, Any]:
    """Every field that must stay as it is when a run goes on, by its full name."""
    fields = {f"{section}.{name}": value for section, fs in config.to_dict().items() for name, value in fs.items()}
    free = {*MAY_CHANGE_ON_RESUME, *SPLIT}
    kept = {n: value for n, value in fields.items() if n in KEPT or not {n, n.partition(".")[0]} & free}
    return {**kept, "training.micro_batch_size x gradient_accumulation_steps": config.effective_batch_size()}


def settled_hash(config: Config) -> str:
    """SHA-256 of what `settled` has beyond the defaults: checkpoints of the same run have the same.

    A field that a later version brings does not change it.
    """
    usual = settled(Config())
    chosen = {name: value for name, value in settled(config).items() if value != usual[name]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def first_difference(old: Config, new: Config) -> str | None:
    """The first field that forbids going on with `old`'s run under `new`, and why; None if all fit."""
    before, after = settled(old), settled(new)
    for name, value in before.items():
        if value != after[name]:
            return f"{name}: {value} -> {after[name]}; {WHY_NOT[name.partition('.')[0]]}"
    return None


def check_same_run(recorded: dict[str, Any], config: Config, provenance: Mapping[str, Any], where: str) -> None:
    """Refuse to mix two runs in one directory.

    Args:
        recorded: the directory's config.json.
        provenance: of the run that is to start: hashes of its data and base model.
    Raises:
        UserError: names the first thing that differs.
    """
    before = Config.from_dict({name: fields for name, fields in recorded.items() if name != "provenance"})
    if before.system.ranks != config.system.ranks:
        check_ranks(before.effective_batch_size(), config)
    difference = first_difference(before, config)
    fix = "choose another output.dir"
    if difference:
        raise UserError(f"output.dir: {where}: holds another run ({difference}): {fix}, or set the field back")
    for key, what in (("data_sha256", "data"), ("base_sha256", "base model")):
        if recorded.get("provenance", {}).get(key) != provenance[key]:
            raise UserError(f"output.dir: {where}: the {what} changed since that run began: {fix}, or put it back")


def check_ranks(rows: int, config: Config) -> None:
    """A run goes on with another number of processes if a step has as many rows as before.

    Raises:
        UserError: it has not; how to split them.
    """
    size, ranks = config.micro_batch_rows(), config.system.ranks
    if config.effective_batch_size() != rows:
        fitting = next(size for size in range(min(size, rows), 0, -1) if rows % (size * ranks) == 0 or size == 1)
        steps, left = divmod(rows, fitting * ranks)
        fix = f"set training.micro_batch_size={fitting} training.gradient_accumulation_steps={steps}"
        raise UserError(
            f"torchrun: a step of this run has {rows} rows, and {ranks} processes with {size} x "
            f"{config.training.gradient_accumulation_steps} would take {config.effective_batch_size()}: "
            + ("start as many processes as divide them" if left else fix)
        )


def questionable(config: Config) -> list[str]:
    """What is allowed and yet probably not meant; one line each, for the terminal."""
    training, warnings = config.training, []
    if training.warmup_steps is None and training.warmup_ratio > 0.2:
        warnings.append(f"training.warmup_ratio={training.warmup_ratio}: more than 20 % of the steps go to warm-up")
    if training.warmup_steps and training.max_steps and training.warmup_steps > 0.2 * training.max_steps:
        warnings.append(f"training.warmup_steps={training.warmup_steps}: more than 20 % of the steps go to warm-up")
    if config.effective_batch_size() < 4:
        warnings.append(
            f"effective batch size {config.effective_batch_size()}: gradients are noisy below 4; "
            "raise training.gradient_accumulation_steps"
        )
    adaptive = training.optimizer != "sgd"  # whose rates are of another order
    if adaptive and training.method == "lora" and training.learning_rate > 5e-4:
        warnings.append(f"training.learning_rate={training.learning_rate}: above 5e-4, LoRA on a large model diverges")
    if adaptive and training.method == "full" and training.learning_rate > 1e-4 and not config.model.random_init:
        warnings.append(f"training.learning_rate={training.learning_rate}: high for training every parameter")
    return warnings


def load_config(path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Read a config file, apply the environment and then the command line's `section.field=value` overrides.

    Raises:
        UserError: anything wrong, naming the file or the field, the value and the fix.
    """
    changes = read_overrides(overrides, environment)
    config = load_file(path).override(changes)
    if config.output.dir:
        return config
    return config.override({"output.dir": f"runs/{run_name(path, changes)}"})


def read_overrides(overrides: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment and then the command line change, as `section.field` -> value.

    Raises:
        UserError: something that is not section.field=value.
    """
    return {**_from_environment(environment), **_from_command_line(overrides)}


def run_name(path: str | Path, changes: Mapping[str, str]) -> str:
    """The config's name; with overrides, a hash of them behind it, so that another experiment is another directory."""
    kept = sorted(f"{k}={v}" for k, v in changes.items() if not k.startswith(("logging.", "output.")))
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:6]
    return f"{Path(path).stem}-{digest}" if kept else Path(path).stem


def load_file(path: str | Path) -> Config:
    """Read one config file: Python (defines `config`), YAML or JSON (sections)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file: try configs/tiny.py")
    try:
        if path.suffix == ".py":
            return _run_python(path)
        tree = _read_tree(path)
        provenance = tree.pop("provenance", None)  # what a run directory's config.json adds
        if not isinstance(provenance, dict | None):
            raise UserError("provenance: not a table: the file is damaged")
        config = _from_flat(tree) if _is_flat(tree) else Config.from_dict(tree)
        return _without_functions(config, is_of_run=provenance is not None)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _without_functions(config: Config, is_of_run: bool) -> Config:
    """To import a function is to run its module, and no file of data may ask for that: a run's list goes on without."""
    functions = [name for name in config.evaluation.metrics if FUNCTION.fullmatch(name)]
    if functions and not is_of_run:
        raise UserError(
            f"evaluation.metrics: {functions[0]}: would run code, which only a config in Python may ask for: "
            f"write one, or give evaluation.metrics={functions[0]} on the command line"
        )
    kept = tuple(name for name in config.evaluation.metrics if name not in functions)
    return config.override({"evaluation.metrics": kept}) if functions else config


def _read_tree(path: Path) -> dict[str, Any]:
    content = read_bytes(path, confined=False)
    try:
        tree = parse_json(content) if path.suffix == ".json" else parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"not valid {path.suffix.lstrip('.').upper()}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError("expected a table of sections (model, data, training, ...)")
    return tree


def _is_flat(tree: Mapping[str, Any]) -> bool:
    """Whether there is no section, but a setting at the top."""
    settings = any(name in ALIASES or not isinstance(value, Mapping) for name, value in tree.items())
    return settings and not tree.keys() & SECTION_TYPES.keys()


def _from_flat(tree: Mapping[str, Any]) -> Config:
    """A config from Hugging Face's names; a mistake is reported by the name that the file has."""
    found = translate(tree)
    try:
        return Config().override({field: value for field, (_, value) in found.items()})
    except UserError as error:
        name, _ = found.get(str(error).partition(":")[0], ("", None))
        raise UserError(f"{name}: {error}" if name else str(error)) from None


def _run_python(path: Path) -> Config:
    """A config written in Python is the user's own program: run it and take its `config`."""
    spec = importlib.util.spec_from_file_location(f"nanoft_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno}: {error.msg}") from None
    except UserError:
        raise
    except Exception as error:  # the file is the user's program, and so is the mistake
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError("defines no `config`: write config = Config(...)")
    return config


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """NANOFT_SECTION__FIELD=value -> {"section.field": value}."""
    named = {k: v for k, v in environment.items() if k.startswith(ENVIRONMENT_PREFIX)}
    if odd := sorted(key for key in named if "__" not in key.removeprefix(ENVIRONMENT_PREFIX)):
        raise UserError(f"{odd[0]}: no such setting: write NANOFT_SECTION__FIELD (two underscores) or unset it")
    return {k.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1): v for k, v in named.items()}


def _from_command_line(overrides: Iterable[str]) -> dict[str, str]:
    changes = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not section.field=value, for example training.max_steps=20")
        changes[key.strip()] = value.strip()
    return changes


def _find_field(key: str) -> tuple[str, str, Any]:
    """'lora.rank' -> ('lora', 'rank', int)."""
    section, _, name = key.partition(".")
    if section not in SECTION_TYPES:
        homes = [s for s, t in SECTION_TYPES.items() if not name and section in typing.get_type_hints(t)]
        hint = f": did you mean {homes[0]}.{section}?" if homes else _nearest(section, SECTION_TYPES)
        raise UserError(f"{key}: no such section{hint}")
    hints = typing.get_type_hints(SECTION_TYPES[section])
    if name not in hints:
        raise UserError(f"{key}: no such field{_nearest(name, hints, f'{section}.')}")
    return section, name, hints[name]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {prefix}{match[0]}?" if match else f": there are {', '.join(known)}"


def _listed(changed: dict[str, Any]) -> dict[str, Any]:
    """YAML and JSON have lists where the dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}


def _parse(key: str, text: str, hint: Any) -> Any:
    """Read `text` as the field's type; `none` stands for no value where that is allowed."""
    options = _options(hint)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    if len(options) > 1 and any(text in get_args(option) for option in options):  # auto, beside numbers
        return text
    kind = next(option for option in options if option is not type(None))
    try:
        if get_origin(kind) is Literal:
            return next(choice for choice in get_args(kind) if str(choice) == text)
        if get_origin(kind) is tuple:
            if get_args(kind)[0] is str and not re.fullmatch(NAMES, text):
                return (text,) if text else ()  # one regular expression
            return tuple(get_args(kind)[0](part) for part in text.strip("[]()").replace(",", " ").split())
        if get_origin(kind) is dict:
            return _parse_table(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (StopIteration, KeyError, ValueError):
        raise UserError(f"{key}: {text!r:.100} is not {_describe(hint)}") from None


def _parse_table(text: str) -> dict[str, Any]:
    """`{instruction: q, response: a}`, as YAML writes a table on one line."""
    table = parse_yaml(text)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError
    return table


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not any(_fits(value, option) for option in _options(hint)):
        raise UserError(f"{name}: {value!r:.100} is not {_describe(hint)}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(kind)[0]) for part in value)
    if get_origin(kind) is dict:
        fits = isinstance(value, dict) and all(_fits(part, get_args(kind)[1]) for part in value.values())
        return fits and all(isinstance(key, str) for key in value)
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind  # bool is not an int here


def _describe(hint: Any) -> str:
    if len(_options(hint)) > 1:
        return " or ".join(_describe(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of names" if get_args(hint)[0] is str else "a list of numbers"
    if get_origin(hint) is dict:
        return "a table like {name: value}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(hint, "none")
