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
import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoft import UserError
from nanoft.config.fields import _check_type, _nearest, _parse, bounded
from nanoft.io.untrusted import redact

Shape = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "summarization",
    "extractive_qa", "text",
]  # fmt: skip
Optimizer = Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged", "sgd"]


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
    max_seq_length: int = bounded(2048, 8)  # tokens; longer samples are truncated or dropped (data.truncation)
    random_init: bool = False  # start from random weights: pre-train from config.json and tokenizer alone


@dataclass(frozen=True)
class LoRAConfig(Section):
    rank: int = bounded(16, 1, 4096)  # width r of the update B A
    alpha: float = bounded(32.0, 1e-6)  # the update is scaled by alpha / rank
    dropout: float = bounded(0.0, 0.0, 0.99)  # probability, on the adapter's input only
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
    double: bool = True  # 4 bits: quantize the scales of the blocks too: 0.37 bit less per weight
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
    max_samples: int | None = bounded(None, 1)  # keep only the first so many records of each file
    # What is kept
    max_bad_records: float = bounded(0.05, 0.0, 1.0)  # share of malformed records above which the run stops
    deduplicate: bool = True  # leave out records that say exactly what an earlier one says
    near_duplicates: float | None = bounded(None, 0.3, 1.0)  # leave out records with this share of 5-grams in common
    near_leaks: Literal["warn", "remove", "ignore"] = "warn"  # prompts that nearly stand in the validation data
    min_characters: int = bounded(1, 1)  # of all messages of a record together
    max_characters: int | None = bounded(None, 1)  # the same, at most
    min_tokens: int = bounded(1, 1)  # of a sample
    # What is held out, when there is no validation_file
    validation_split: float = bounded(0.05, 0.0, 0.9)  # share of the prompts
    validation_size: int | None = bounded(None, 1)  # so many records instead of a share
    split_stratify: str | None = None  # a field, or `length`: each of its values gives its share; none: label_field
    split_group: str | None = None  # a field: records with the same value stay on one side
    split_time: str | None = None  # a field with dates or numbers: the newest records are held out
    # What becomes of it
    template_args: dict[str, Any] = field(default_factory=dict)  # more for the chat template: {enable_thinking: false}
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"  # whose tokens are targets
    truncation: Literal["drop", "prompt", "response", "proportional", "reject"] = "drop"  # of over-long samples
    packing: bool = False  # several short samples in one row; they never attend to each other
    group_by_length: bool = False  # rows of like length together, so that batches pad little
    pad_to_multiple_of: int = bounded(1, 1, 1024)  # widths of micro-batches are rounded up to it


@dataclass(frozen=True)
class TrainingConfig(Section):
    method: Literal["lora", "full"] = "lora"  # train adapters, or every parameter
    micro_batch_size: int | Literal["auto"] = bounded(4, 1)  # rows per forward pass; auto: as many as fit into memory
    gradient_accumulation_steps: int = bounded(4, 1)  # micro-batches per optimizer step; with auto: rows of a step
    num_epochs: int = bounded(3, 1)  # passes over the training data
    max_steps: int | None = bounded(None, 1)  # stop after so many optimizer steps, whatever num_epochs says
    optimizer: Optimizer = "adamw"  # 8bit: moments in 8 bits; paged: moments move to the CPU when the GPU is full
    learning_rate: float = bounded(2e-4, 0.0)  # peak
    lora_plus_ratio: float = bounded(1.0, 1.0)  # B learns so many times as fast as A (LoRA+); 16 is usual
    lr_scheduler: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"  # shape after the warm-up
    lr_power: float = bounded(1.0, 0.0)  # of polynomial: (1 - t)^power
    warmup_ratio: float = bounded(0.03, 0.0, 1.0)  # share of the steps spent on linear warm-up
    warmup_steps: int | None = bounded(None, 0)  # if given, beats warmup_ratio
    min_lr_ratio: float = bounded(0.0, 0.0, 1.0)  # the schedule ends at learning_rate * min_lr_ratio
    weight_decay: float = bounded(0.0, 0.0)  # decoupled (sgd: added to the gradient); matrices only
    beta1: float = bounded(0.9, 0.0, 0.99999)  # decay of the gradient's running mean
    beta2: float = bounded(0.999, 0.0, 0.99999)  # decay of its running square
    epsilon: float = bounded(1e-8, 0.0)  # added to the root of the running square
    momentum: float = bounded(0.9, 0.0, 0.99999)  # of sgd, which knows neither beta nor epsilon
    max_grad_norm: float = bounded(1.0, 0.0)  # clip the global gradient norm to this; 0: no clipping
    label_smoothing: float = bounded(0.0, 0.0, 0.99)  # probability spread evenly over the vocabulary
    z_loss: float = bounded(0.0, 0.0, 1.0)  # weight of the squared log-normalizer; 1e-4 where it is used
    neftune_alpha: float = bounded(0.0, 0.0)  # uniform noise on the embeddings while training (NEFTune); 5 is usual
    checkpointing: Literal["auto", "none", "every_k", "full", "offload"] = "auto"  # activations computed again
    checkpoint_every: int = bounded(2, 1)  # with every_k: of so many blocks, the activations of one are computed again
    sharding: Literal["none", "full"] = "none"  # full: weights, gradients and moments split over the ranks (torchrun)
    compile: bool = False  # compile each block: worth its minute on CUDA; a CPU needs a C++ compiler for it
    log_steps: int = bounded(10, 1)  # optimizer steps between two `train` lines of metrics.jsonl
    eval_steps: int = bounded(100, 0)  # optimizer steps between evaluations; 0: only at the end
    save_steps: int = bounded(500, 0)  # optimizer steps between checkpoints; 0: only at the end
    keep_checkpoints: int = bounded(3, 1)  # the newest so many, and the best
    early_stopping_patience: int = bounded(0, 0)  # stop after so many evaluations without improvement; 0: never
    early_stopping_threshold: float = bounded(0.0, 0.0)  # what counts as improvement, in nats per target token
    keep_every: int = bounded(0, 0)  # and those of steps that are multiples of this, for good; 0: no others


@dataclass(frozen=True)
class GuardConfig(Section):
    """What happens when a loss or gradient is not finite, or far above those before."""

    max_skips: int = bounded(5, 1)  # windows left out in a row before the run goes back to its last checkpoint
    max_rollbacks: int = bounded(3, 0)  # so often; then it ends with exit code 3
    rollback_rate: float = bounded(0.5, 0.001, 1.0)  # factor on the learning rate at each rollback
    on_spike: Literal["warn", "skip", "rollback"] = "warn"  # the strongest measure against a spike
    spike_score: float = bounded(10.0, 1.0)  # robust deviations above the median that make a spike
    spike_window: int = bounded(100, 20)  # steps that it is compared with


@dataclass(frozen=True)
class OutputConfig(Section):
    dir: str = ""  # run directory; empty: runs/<config name>, plus a hash of the overrides if there are any


@dataclass(frozen=True)
class LoggingConfig(Section):
    progress_bar: bool = True  # a tqdm bar on stderr
    show_example: bool = True  # print one training sample with its target tokens marked
    plots: Literal["none", "end", "epoch", "step"] = "none"  # when to draw the curves in plots/; step: each logged one
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # who is told besides metrics.jsonl; wandb: offline
    gradient_steps: int = bounded(0, 0)  # optimizer steps between two looks at the gradients by module; 0: none


@dataclass(frozen=True)
class SystemConfig(Section):
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    seed: int = bounded(0, 0, 2**32 - 1)  # data order, adapter initialization, dropout
    deterministic: bool = False  # deterministic CUDA kernels (slower); the CPU always is
    threads: int = bounded(0, 0)  # CPU threads; 0: PyTorch's choice
    memory_gb: float | None = bounded(None, 0.1)  # of the device, for --plan where it is not; where it is, it counts
    ranks: int = bounded(1, 1)  # processes that share each optimizer step: as many as torchrun starts
    profile: bool = False  # record a few steps into profile/, and the operators that take the time
    kernels: Literal["auto", "plain"] = "auto"  # plain: only the core's own formulas, slower and with more memory
    debug: bool = False  # stop at the operation whose gradient is NaN, and name it (several times slower)


@dataclass(frozen=True)
class EvaluationConfig(Section):
    batch_size: int = bounded(16, 1)  # rows per forward pass
    max_samples: int | None = bounded(None, 1)  # evaluate the loss on at most so many validation samples
    prompts: int = bounded(200, 0)  # held-out prompts answered by base and tuned at the end; 0: none
    prompt_batch_size: int = bounded(64, 1)  # prompts answered at once
    max_new_tokens: int = bounded(128, 1)  # per answer
    temperature: float = bounded(0.0, 0.0)  # of the answers; 0: always the most likely token
    top_k: int = bounded(0, 0)  # with a temperature: among so many of the likeliest tokens; 0: all
    top_p: float = bounded(1.0, 1e-6, 1.0)  # with a temperature: among the likeliest tokens with this probability
    min_p: float = bounded(0.0, 0.0, 1.0)  # with a temperature: among tokens with this share of the likeliest one's
    repetition_penalty: float = bounded(1.0, 0.01)  # makes tokens that were there less likely; 1: it does not
    metrics: tuple[str, ...] = ()  # of the answers, besides exact match: docs/evaluation.md; the first decides who wins
    by_field: str | None = None  # a field of the records: perplexity for each of its values
    stride: int | None = bounded(None, 1)  # of the windows over texts longer than the context; none: half the context
    samples: int = bounded(3, 0)  # answers shown side by side


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


SECTION_TYPES: dict[str, type] = typing.get_type_hints(Config)
SECTION_NAMES: dict[str, str] = {hint.__name__: name for name, hint in SECTION_TYPES.items()}


def config_warnings(config: Config) -> list[str]:
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


def _listed(changed: dict[str, Any]) -> dict[str, Any]:
    """YAML and JSON have lists where the dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}
