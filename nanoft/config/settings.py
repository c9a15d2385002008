"""Every setting of a run, in one typed tree.

A config is a value: frozen dataclasses, one per concern, that validate themselves on creation and never change.
A config file is a small Python module that defines `config`, or YAML/JSON with the same sections, or a flat file with
Hugging Face's names (nanoft/config/aliases.py). One config builds on another: `base.override(lora={"rank": 8})`.
Later sources win: the file, then the environment (`NANOFT_TRAINING__MAX_STEPS=20`), then the command line.

Types, ranges and combinations are checked here. Fields marked (table) name an entry of a table in another module, such
as `OPTIMIZERS` in nanoft/optim.py; `validate_config` in nanoft/training/validation.py checks them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoft import UserError
from nanoft.config.fields import bounded, check_type, nearest, parse
from nanoft.io.untrusted import redact


class Section:
    """Base of the section dataclasses: validates types and ranges when an instance is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            name = f"{SECTION_NAMES[type(self).__name__]}.{item.name}"
            check_type(name, value, hints[item.name])
            if redact(repr(value)) != repr(value):  # people share a run's config.json
                fix = "remove it and set HF_TOKEN or WANDB_API_KEY; if it is a file name, rename the file"
                raise UserError(f"{name}: contains what looks like an access token: {fix}")
            low, high = item.metadata.get("low", -math.inf), item.metadata.get("high", math.inf)
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, (int, float)) and not low <= number <= high:
                    wanted = f">= {low}" if high == math.inf else f"between {low} and {high}"
                    raise UserError(f"{name}: {number} is out of range: it must be {wanted}")


@dataclass(frozen=True)
class ModelConfig(Section):
    name: str = ""  # Hub name or directory in the Hugging Face layout
    revision: str = ""  # of a Hub name: branch, tag or commit; empty: its main branch
    cache_dir: str = ""  # of downloads from the Hub, of models and data; empty: HF_HUB_CACHE, else HF_HOME/hub
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute dtype; auto: the device's fastest
    base_device: Literal["auto", "host"] = "auto"  # host: frozen blocks stay in host memory; auto: if a GPU has no room
    max_seq_length: int = bounded(2048, 8)  # tokens per sample; longer samples: data.truncation
    add_tokens: tuple[str, ...] = ()  # new special tokens, whose rows of embedding and head are trained: [<|a|>, <|b|>]
    chat_template: str | None = None  # a file, chatml, or a name in the model's own list; none: the model's own
    random_init: bool = False  # pre-train from random weights; only config.json and the tokenizer are needed

    @property
    def reference(self) -> str:
        """The model as one string, NAME or NAME@REVISION."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class LoRAConfig(Section):
    rank: int = bounded(16, 1, 4096)  # r of the update B A
    alpha: float = bounded(32.0, 1e-6)  # the update is scaled by alpha / rank
    dropout: float = bounded(0.0, 0.0, 0.99)  # probability, on the input of the adapter
    target_modules: tuple[str, ...] = ("all-linear",)  # or attention, mlp, names (q_proj, lm_head), regular expressions
    # Per module, by name or regular expression; the first match applies:
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"low": 1, "high": 4096})  # {q_proj: 8}
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"low": 1e-6})  # {q_proj: 16}
    rslora: bool = False  # scale by alpha / sqrt(rank) instead (rsLoRA)
    dora: bool = False  # train the norm of each output row of the weight separately (DoRA)
    freeze_a: bool = False  # train B only (LoRA-FA)
    init: str = "default"  # (table) or pissa: start from the top singular vectors of the weight (PiSSA)
    bias: Literal["none", "all", "lora_only"] = "none"  # biases to train; lora_only: of linears with adapters
    modules_to_save: tuple[str, ...] = ()  # modules to train as a whole, such as lm_head, embed_tokens, norm
    start_from: str = ""  # run or adapter directory to continue from; its rank and target modules apply
    # Tokens whose rows of the embedding or the head are trained; model.add_tokens adds its own:
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)  # {embed_tokens: [5, 6]}


@dataclass(frozen=True)
class QuantizationConfig(Section):
    bits: Literal[4, 8, 16] = 16  # of frozen linear weights; 4: QLoRA; 8: int8, one scale per row; 16: model.dtype
    type: Literal["nf4", "fp4"] = "nf4"  # 4-bit data type
    double: bool = True  # 4 bits: quantize the block scales too; saves 0.37 bits per weight
    dequantize: Literal["auto", "per_use", "cached"] = "auto"  # at each use, or once; auto: once if a GPU has room


@dataclass(frozen=True)
class DataConfig(Section):
    # Reading
    train_file: str = ""  # file, directory, glob or hf://datasets/owner/name; or several, separated by commas
    weights: tuple[float, ...] = ()  # passes over each of several train_files per epoch; empty: 1 each
    validation_file: str | None = None  # none: split off from train_file
    format: str = "auto"  # (table) record shape, or module:function; auto: detected
    columns: dict[str, str] = field(default_factory=dict)  # standard name -> name in the file: {instruction: q}
    roles: dict[str, str] = field(default_factory=dict)  # role in the file -> standard name: {agent: assistant}
    delimiter: str | None = None  # of CSV files; none: detected from the header
    label_field: str | None = None  # keep only records whose label is positive (true, 1, good, ...); ignore: all
    margin_field: str | None = None  # of pairs, for reward models: how much better the chosen answer is
    max_samples: int | None = bounded(None, 1)  # records to keep from the start of each file
    # Filtering
    max_bad_records: float = bounded(0.05, 0.0, 1.0)  # largest accepted share of malformed records
    deduplicate: bool = True  # drop exact copies of earlier records
    near_duplicates: float | None = bounded(None, 0.3, 1.0)  # drop records that share this fraction of 5-grams
    leaks: Literal["remove", "warn", "ignore"] = "remove"  # training records with the prompt of a validation record
    near_leaks: Literal["warn", "remove", "ignore"] = "warn"  # training prompts nearly equal to validation prompts
    min_characters: int = bounded(1, 1)  # per record, over all messages
    max_characters: int | None = bounded(None, 1)  # per record, over all messages
    min_tokens: int = bounded(1, 1)  # per sample
    min_target_tokens: int = bounded(1, 1)  # per sample
    min_score: str = ""  # FIELD:x: keep only records whose number in that field is at least x: quality:0.5
    # Splitting, without a validation_file
    validation_split: float = bounded(0.05, 0.0, 0.9)  # share of the prompts to hold out
    validation_size: int | None = bounded(None, 1)  # number of records to hold out instead
    split_stratify: str | None = None  # field, or `length`, to stratify by; none: label_field
    split_group: str | None = None  # field whose records with the same value stay together
    split_time: str | None = None  # field with dates or numbers: hold out the newest records
    # Tokenizing and batching
    template_args: dict[str, Any] = field(default_factory=dict)  # for the chat template: {enable_thinking: false}
    unrendered: Literal["refuse", "warn"] = "refuse"  # thoughts, calls, tools that the chat template omits
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"  # which tokens are targets
    control_tokens: Literal["text", "parse"] | None = None  # </s> in a text: characters or a token; none: ask if common
    chunk: bool = True  # split plain texts that are too long into several samples; false: data.truncation
    truncation: Literal["drop", "prompt", "response", "proportional", "reject"] = "drop"  # of long samples
    packing: bool = False  # several samples per sequence; they never attend to each other
    group_by_length: bool = False  # similar lengths in one batch: less padding
    pad_to_multiple_of: int = bounded(1, 1, 1024)  # tokens; micro-batch lengths are rounded up to it

    @property
    def score_limit(self) -> tuple[str, float] | None:
        """The two parts of min_score."""
        found = re.fullmatch(r"\s*(\S.*?)\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", self.min_score)
        return (found[1], float(found[2])) if found else None

    @property
    def stratify_field(self) -> str | None:
        return self.split_stratify or (self.label_field if self.label_field != "ignore" else None)


@dataclass(frozen=True)
class TrainingConfig(Section):
    objective: str = "sft"  # (table) what training minimizes
    method: Literal["lora", "full"] = "lora"  # train adapters or every parameter
    micro_batch_size: int | Literal["auto"] = bounded(4, 1)  # sequences per forward pass; auto: what fits
    gradient_accumulation_steps: int = bounded(4, 1)  # micro-batches per step; with auto: sequences
    num_epochs: float = bounded(3, 1e-6)  # passes over the training data; steps are rounded up
    max_steps: int | None = bounded(None, 1)  # optimizer steps; overrides num_epochs
    optimizer: str = "adamw"  # (table) 8bit: moments in 8 bits; paged: moments move to the CPU when the GPU is full
    learning_rate: float = bounded(2e-4, 1e-12, 1.0)  # peak, reached after the warm-up
    lora_plus_ratio: float = bounded(1.0, 1.0)  # learning rate of B / that of A (LoRA+); 16 is usual
    lr_scheduler: str = "cosine"  # (table) shape after the warm-up
    lr_power: float = bounded(1.0, 0.0)  # exponent of polynomial: (1 - t)^power
    lr_cycles: int = bounded(1, 1)  # of cosine_with_restarts: cosines after the warm-up; 1: the same as cosine
    lr_decay_ratio: float = bounded(0.1, 0.001, 1.0)  # of wsd: share of the steps after the warm-up spent on the decay
    warmup_ratio: float = bounded(0.03, 0.0, 1.0)  # share of all steps spent on linear warm-up
    warmup_steps: int | None = bounded(None, 0)  # optimizer steps; overrides warmup_ratio
    long_warmup: Literal["refuse", "warn"] = "refuse"  # if the warm-up is longer than the run
    min_lr_ratio: float = bounded(0.0, 0.0, 1.0)  # the schedule ends at learning_rate * min_lr_ratio
    weight_decay: float = bounded(0.0, 0.0)  # decoupled (sgd: added to the gradient), of matrices
    beta1: float = bounded(0.9, 0.0, 0.99999)  # decay of the running mean of the gradient
    beta2: float = bounded(0.999, 0.0, 0.99999)  # decay of the running mean of its square
    epsilon: float = bounded(1e-8, 0.0)  # added to the root of adamw's running mean square
    momentum: float = bounded(0.9, 0.0, 0.99999)  # of sgd, which has neither beta nor epsilon
    max_grad_norm: float = bounded(1.0, 0.0)  # clips the global gradient norm; 0: no clipping
    label_smoothing: float = bounded(0.0, 0.0, 0.99)  # probability spread evenly over the vocabulary
    z_loss: float = bounded(0.0, 0.0, 1.0)  # weight of the squared log-normalizer; 1e-4 is usual
    balance_loss: float = bounded(0.0, 0.0, 10.0)  # weight of the loss that keeps experts equally busy; 0.01 is usual
    neftune_alpha: float = bounded(0.0, 0.0)  # scale of uniform noise on the embeddings (NEFTune); 5 is usual
    checkpointing: Literal["auto", "none", "every_k", "full", "offload"] = "auto"  # activation checkpointing
    checkpoint_every: int = bounded(2, 1)  # k of every_k: one block in k is recomputed
    sharding: Literal["none", "full"] = "none"  # full: shard weights, gradients and state over the ranks
    compile: bool = False  # torch.compile each block: takes a minute; on a CPU it needs a C++ compiler
    shuffle: bool = True  # a new order in each epoch; false: always the order of the files
    # Optimizer steps, a fraction of the run (0.25), or epoch; 0: only at the end
    log_steps: int | float | Literal["epoch"] = bounded(10, 0)  # between `train` lines of metrics.jsonl
    eval_steps: int | float | Literal["epoch", "auto"] = bounded("auto", 0)  # auto: a quarter epoch, at most 100
    save_steps: int | float | Literal["epoch"] = bounded(500, 0)  # between checkpoints; the best are saved anyway
    keep_checkpoints: int = bounded(3, 1)  # number of newest checkpoints to keep; the best is kept too
    early_stopping_patience: int = bounded(0, 0)  # evaluations without improvement; 0: never stop early
    early_stopping_threshold: float = bounded(0.0, 0.0)  # smallest improvement, in nats per target token
    keep_every: int = bounded(0, 0)  # steps between checkpoints that are never deleted; 0: none


@dataclass(frozen=True)
class PreferenceConfig(Section):
    """Objectives on pairs and labels; a field that the objective does not read is refused (docs/preference.md)."""

    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"  # of dpo
    beta: float | None = bounded(None, 1e-6)  # weight of the implicit reward; none: 0.1, of simpo 2
    label_smoothing: float = bounded(0.0, 0.0, 0.49)  # share of wrong labels: sigmoid (conservative DPO), robust
    sft_weight: float = bounded(0.0, 0.0)  # of the negative log-likelihood per token of the chosen answers
    gamma: float = bounded(0.5, 0.0)  # of simpo: margin by which the chosen answer's reward must be larger
    desirable_weight: float = bounded(1.0, 0.0)  # of kto: of good answers
    undesirable_weight: float = bounded(1.0, 0.0)  # of kto: of bad answers
    center: float = bounded(0.0, 0.0)  # of reward: weight of the squared sum of a pair's rewards; 0.01 is usual


@dataclass(frozen=True)
class RLConfig(Section):
    """Objectives that learn from answers sampled from the model (docs/rewards.md)."""

    reward: tuple[str, ...] = ()  # how answers are scored: metrics, package.module:function, run:DIR (a reward model)
    reward_weights: tuple[float, ...] = ()  # of each in the sum; none: 1
    reward_timeout: float = bounded(10.0, 0.0, 86400.0)  # seconds for one answer; 0: none
    prompts: int = bounded(8, 1)  # prompts per step
    group_size: int = bounded(8, 2)  # answers per prompt
    updates: int = bounded(1, 1)  # optimizer steps on the answers of one step
    temperature: float = bounded(1.0, 0.01)  # of sampling
    top_p: float = bounded(1.0, 1e-6, 1.0)  # sample from the likeliest tokens with this total probability
    max_new_tokens: int = bounded(256, 1)  # tokens per answer
    mask_truncated: bool = False  # do not learn from answers that reach max_new_tokens
    advantage_scale: Literal["group", "none"] = "group"  # group: divide by the standard deviation of a group's rewards
    ratio: Literal["token", "sequence"] = "token"  # sequence: the geometric mean over an answer (GSPO)
    clip_low: float = bounded(0.2, 0.0, 1.0)  # ratios below 1 - clip_low have no gradient; with updates > 1
    clip_high: float = bounded(0.2, 0.0)  # likewise for ratios above 1 + clip_high; DAPO: 0.28
    loss_normalization: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # by tokens, by answers, by the limit on tokens
    beta: float = bounded(0.0, 0.0)  # weight of the KL divergence from the policy at step 0


@dataclass(frozen=True)
class DistillConfig(Section):
    """Distillation: learning a teacher's next-token distribution (docs/rewards.md)."""

    teacher: str = ""  # a run, an adapter, or a model with the same vocabulary
    teacher_bits: Literal[4, 16] = 4  # of a model: 4 is NF4; the base of a run or adapter stays as in its training
    on_policy: bool = True  # on answers sampled from the student; false: on those of the data
    beta: float = bounded(1.0, 0.0, 1.0)  # 0: KL(teacher | student), 1: KL(student | teacher), between: Jensen-Shannon
    temperature: float = bounded(1.0, 0.01)  # of both models, and of sampling
    top_k: int = bounded(0, 0)  # compare only this many of the teacher's likeliest tokens; 0: all
    max_new_tokens: int = bounded(256, 1)  # tokens per sampled answer

    @property
    def sampled_tokens(self) -> int:
        return self.max_new_tokens if self.teacher and self.on_policy else 0


@dataclass(frozen=True)
class GuardConfig(Section):
    """How the run reacts to a loss or gradient norm that is not finite, or spikes."""

    max_skips: int = bounded(5, 1)  # consecutive windows to skip before rolling back to a checkpoint
    max_rollbacks: int = bounded(3, 0)  # before the run ends with exit code 3
    rollback_rate: float = bounded(0.5, 0.001, 1.0)  # factor on the learning rate per rollback
    on_spike: Literal["warn", "skip", "rollback"] = "warn"  # strongest response to a spike
    spike_score: float = bounded(10.0, 1.0)  # a spike is this many robust deviations above the median
    spike_window: int = bounded(100, 20)  # steps to compare with


@dataclass(frozen=True)
class OutputConfig(Section):
    dir: str = ""  # run directory; empty: runs/<config name>; overrides add their base, data and method, and a hash


@dataclass(frozen=True)
class LoggingConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"  # of the terminal; debug: also events of metrics.jsonl
    progress_bar: bool = True  # tqdm, on stderr
    show_example: bool = True  # print one training sample with its target tokens marked
    plots: Literal["none", "end", "epoch", "step"] = "end"  # when to draw the curves; step: every log_steps
    # Trackers besides metrics.jsonl: none, tensorboard, trackio, wandb, or several (wandb,trackio)
    report_to: str | tuple[str, ...] = "none"  # all: those that are installed; auto: one, but not wandb
    gradient_steps: int = bounded(0, 0)  # optimizer steps between gradient norms per module; 0: none


@dataclass(frozen=True)
class SystemConfig(Section):
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    seed: int = bounded(0, 0, 2**32 - 1)  # data order, adapter initialization, dropout
    deterministic: bool = False  # deterministic CUDA kernels (slower); a CPU is always deterministic
    threads: int | Literal["auto"] = bounded("auto", 0, 1024)  # of the CPU; auto (or 0): the cores that may be used
    memory_gb: float | None = bounded(None, 0.1)  # of the device, for --plan on another machine
    ranks: int = bounded(1, 1)  # world size: the number of processes that torchrun starts
    profile: bool = False  # write a profile of a few steps to profile/
    kernels: Literal["auto", "plain"] = "auto"  # plain: only the core's formulas; slower, more memory
    debug: bool = False  # stop at the first NaN gradient and name its operation (several times slower)


@dataclass(frozen=True)
class EvaluationConfig(Section):
    batch_size: int = bounded(16, 1)  # sequences per forward pass
    max_samples: int | None = bounded(None, 1)  # validation samples for the loss, at most
    prompts: int = bounded(200, 0)  # held-out prompts that the base and the tuned model answer at the end
    prompt_batch_size: int = bounded(64, 1)  # prompts generated at once
    max_new_tokens: int = bounded(128, 1)  # tokens per answer
    temperature: float = bounded(0.0, 0.0)  # of sampling; 0: greedy
    top_k: int = bounded(0, 0)  # sample from this many of the likeliest tokens; 0: all
    top_p: float = bounded(1.0, 1e-6, 1.0)  # sample from the likeliest tokens with this total probability
    min_p: float = bounded(0.0, 0.0, 1.0)  # sample from tokens with this share of the top probability
    repetition_penalty: float = bounded(1.0, 0.01)  # divides the logits of earlier tokens; 1: no effect
    metrics: tuple[str, ...] = ()  # (table) besides exact match; the first picks the winner: docs/evaluation.md
    by_field: str | None = None  # record field: report perplexity for each of its values
    stride: int | None = bounded(None, 1)  # tokens between windows over texts beyond the context; none: half of it
    samples: int = bounded(3, 0)  # prompts whose answers are shown at each evaluation and in the report
    on_start: bool = False  # also evaluate before the first step
    general_file: str | None = None  # general texts, whose perplexity at the end shows how much the model forgot


@dataclass(frozen=True)
class Config:
    """One run: every section, validated alone and together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        t, d, bits, sharded = self.training, self.data, self.quantization.bits, self.training.sharding == "full"
        stride, length = self.evaluation.stride, self.model.max_seq_length
        packed_full = t.method == "full" and bits != 16
        _refuse(packed_full, f"quantization.bits: {bits} needs a frozen base: set it to 16 or training.method=lora")
        fix = "not supported with training.sharding=full: change one of them"
        _refuse(sharded and t.compile, f"training.compile: {fix}")
        host, again = self.model.base_device == "host", t.checkpointing
        fix = "model.base_device: host: not supported with"
        _refuse(host and t.method == "full", f"{fix} training.method=full: nothing is frozen: remove one of them")
        _refuse(host and sharded, f"{fix} training.sharding=full: remove one of them")
        _refuse(host and t.compile, f"{fix} training.compile: set that to false")
        keeps = host and again in ("none", "every_k")
        _refuse(keeps, f"training.checkpointing: {again}: model.base_device=host recomputes blocks: set it to full")
        per_module = sharded and self.logging.gradient_steps
        _refuse(per_module, "logging.gradient_steps: not supported with training.sharding=full: set it to 0")
        idle = t.early_stopping_patience and not t.eval_steps
        _refuse(idle, "training.early_stopping_patience: no effect with training.eval_steps=0: raise eval_steps")
        for name in ("log_steps", "eval_steps", "save_steps"):
            wrong = isinstance(every := getattr(t, name), float) and not 0 < every < 1
            _refuse(wrong, f"training.{name}: {every}: set a number of steps, a fraction of the run below 1, or epoch")
        reorders = d.group_by_length and not t.shuffle
        _refuse(reorders, "training.shuffle: data.group_by_length changes the order of the data: set it to false")
        random = self.model.random_init and t.method != "full"
        _refuse(random, "model.random_init: adapters cannot train random weights: set training.method=full")
        no_b = t.lora_plus_ratio != 1 and t.method != "lora"
        _refuse(no_b, "training.lora_plus_ratio: needs training.method=lora: set method=lora, or the ratio to 1")
        _refuse(not self.lora.target_modules, "lora.target_modules: empty: name at least one module, such as q_proj")
        check_expressions(self.lora)
        tokens = self.model.add_tokens and t.method == "full"
        _refuse(tokens, "model.add_tokens: trains rows beside a frozen model: set training.method=lora")
        same = d.validation_file and d.validation_file == d.train_file
        _refuse(same, "data.validation_file: equals data.train_file: remove it to split that file")
        two_splits = d.split_time and (d.split_group or d.split_stratify)
        _refuse(two_splits, "data.split_time: cannot be combined with split_group or split_stratify: remove them")
        windows = f"evaluation.stride: {stride}: windows of model.max_seq_length={length} tokens must overlap"
        _refuse(stride and stride >= length, f"{windows}: lower it")
        no_score = d.min_score and not d.score_limit
        _refuse(no_score, f"data.min_score: {d.min_score!r:.60}: write FIELD:x, such as quality:0.5")
        wrong_weight = any(not 0 <= weight <= 100 for weight in d.weights)
        _refuse(wrong_weight, f"data.weights: {d.weights}: each weight must be between 0 and 100")
        try:
            json.dumps([d.template_args, d.columns])
        except (TypeError, ValueError):
            raise UserError("data.template_args: not JSON: use strings, numbers, booleans, lists, mappings") from None

    def override(self, changes: Mapping[str, Any] | None = None, /, **sections: Mapping[str, Any]) -> Config:
        """Return a copy with some fields replaced; strings are parsed by the field's type.

        config.override({"training.max_steps": 20})
        config.override(training={"max_steps": 20}, lora={"rank": 8})
        """
        nested = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in {**(changes or {}), **nested}.items():
            section, name, hint = _find_field(key)
            value = parse(key, value, hint) if isinstance(value, str) else value
            by_section.setdefault(section, {})[name] = tuple(value) if isinstance(value, list) else value
        replaced = {section: dataclasses.replace(getattr(self, section), **new) for section, new in by_section.items()}
        return dataclasses.replace(self, **replaced)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The tree as plain JSON values; `Config.from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def flat(self) -> dict[str, Any]:
        """The values by full name: section.field -> value."""
        return flatten(self.to_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """Build a config from nested sections, as in YAML or JSON."""
        return cls().override(flatten(tree))

    def effective_batch_size(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        if self.rl.reward:
            return self.rl.prompts * self.rl.group_size
        return self.micro_batch_rows() * self.training.gradient_accumulation_steps * self.system.ranks

    @property
    def sampled_tokens(self) -> int:
        """The longest answer that training samples, in tokens; 0: its answers come from the data."""
        return self.rl.max_new_tokens if self.rl.reward else self.distill.sampled_tokens

    @property
    def answer_tokens(self) -> int:
        """The longest answer to a held-out prompt, in tokens: never shorter than those that training samples."""
        return max(self.evaluation.max_new_tokens, self.sampled_tokens)

    def micro_batch_rows(self) -> int:
        """Sequences per forward pass; 1 while `auto` is not resolved."""
        size = self.training.micro_batch_size
        return 1 if size == "auto" else size

    @property
    def sample_length(self) -> int:
        """The longest sample of the data, in tokens; unlimited if sampled answers replace those of the data."""
        return 2**31 - 1 if self.sampled_tokens else self.model.max_seq_length


def _refuse(broken: object, message: str) -> None:
    if broken:
        raise UserError(message)


def check_expressions(lora: LoRAConfig) -> None:
    """Validate names of modules, which may be regular expressions."""
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        for expression in getattr(lora, name):
            try:
                with warnings.catch_warnings(action="ignore"):  # about syntax that may change
                    re.compile(expression)
                    re.compile(rf"(.*\.)?({expression})$")  # as a pattern's key is used
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(f"lora.{name}: {expression!r:.100} is not a regular expression: {error}") from None


SECTION_TYPES: dict[str, type] = typing.get_type_hints(Config)
FIELDS = {f"{section}.{f.name}": f.name for section, kind in SECTION_TYPES.items() for f in dataclasses.fields(kind)}
SECTION_NAMES: dict[str, str] = {hint.__name__: name for name, hint in SECTION_TYPES.items()}


def flatten(tree: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """{"lora": {"rank": 8}} -> {"lora.rank": 8}; `also`: sections that nanoft does not have."""
    for section, fields in tree.items():
        if section not in SECTION_TYPES and section not in also:
            raise UserError(f"{section}: no such section{nearest(str(section), SECTION_TYPES)}")
        if not isinstance(fields, Mapping):
            raise UserError(f"{section}: {fields!r:.100} is not a mapping of fields")
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}


def config_warnings(config: Config, total_steps: int | None = None) -> list[str]:
    """Valid settings that are probably a mistake, one line each; some need the number of steps."""
    t, warnings, long = config.training, [], "more than 20 % of the steps are warm-up"
    total_steps = total_steps or t.max_steps
    if t.warmup_steps is None and t.warmup_ratio > 0.2:
        warnings.append(f"training.warmup_ratio={t.warmup_ratio}: {long}")
    if t.warmup_steps and total_steps and t.warmup_steps > 0.2 * total_steps:
        warnings.append(f"training.warmup_steps={t.warmup_steps}: {long}")
    if (size := config.effective_batch_size()) < 4:
        fix = "raise training.gradient_accumulation_steps"
        warnings.append(f"effective batch size {size}: gradients are noisy below 4: {fix}")
    adaptive = t.optimizer.startswith("adamw")  # other optimizers need learning rates of another magnitude
    if adaptive and t.method == "lora" and t.learning_rate > 5e-4:
        warnings.append(f"training.learning_rate={t.learning_rate}: above 5e-4, LoRA on large models may diverge")
    if adaptive and t.method == "full" and t.learning_rate > 1e-4 and not config.model.random_init:
        warnings.append(f"training.learning_rate={t.learning_rate}: high for training every parameter")
    return warnings


def _find_field(key: str) -> tuple[str, str, Any]:
    """'lora.rank' -> ('lora', 'rank', int)."""
    section, _, name = key.partition(".")
    if section not in SECTION_TYPES:
        homes = [s for s, t in SECTION_TYPES.items() if not name and section in typing.get_type_hints(t)]
        hint = f": did you mean {homes[0]}.{section}?" if homes else nearest(section, SECTION_TYPES)
        raise UserError(f"{key}: no such section{hint}")
    hints = typing.get_type_hints(SECTION_TYPES[section])
    if name not in hints:
        raise UserError(f"{key}: no such field{nearest(name, hints, f'{section}.')}")
    return section, name, hints[name]
