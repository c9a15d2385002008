"""Two schemas of other programs whose files run as they are, each recognized by its names.

    {"task": "text-generation", "strategy": "qlora", "compute_specs": "low_end", ...}     ModelForge: flat
    training: {batch_size: 2, adam_beta1: 0.9, lr_scheduler_type: cosine}                 MLX: with sections

A schema is a table of names like that of `aliases.py`, the values that its files leave out, and the names that have no
effect beside others. What became of each name is printed in a few lines and saved in the run directory (`FIELDS_FILE`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoft import UserError
from nanoft.config.aliases import (
    ALIASES,
    DTYPES,
    RULES,
    Alias,
    Meaning,
    Note,
    Rule,
    Settings,
    installed,
    noted,
    steps,
    whole,
)
from nanoft.config.settings import FIELDS, SECTION_TYPES, Config
from nanoft.io.tables import wrap

FIELDS_FILE = "fields.txt"  # in the run directory


@dataclass(frozen=True)
class Schema:
    name: str
    table: Mapping[str, Alias]
    rules: Sequence[Rule] = ()
    defaults: Settings = field(default_factory=dict)  # what a file leaves out, where nanoft's default differs
    environment: Mapping[str, str] = field(default_factory=dict)  # variable -> name in the table
    warn: Callable[[Config], list[str]] = lambda config: []


def between(low: float, high: float, kind: str = "number", above: bool = False) -> Callable[[Any], Any]:
    """A check that a value lies in [low, high], or in (low, high] if it must be `above` low."""

    def check(value: Any) -> Any:
        value = whole(value) if kind == "integer" else value
        fits = type(value) in ((int,) if kind == "integer" else (int, float)) and low <= value <= high
        if not fits or (above and value == low):
            raise ValueError(f"must be {'an' if kind == 'integer' else 'a'} {kind} {'>' if above else '>='} {low}"
                             + (f" and <= {high}" if high < float("inf") else ""))  # fmt: skip
        return value

    return check


def filled(value: Any) -> Any:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("cannot be empty: name one")
    return value


# --- ModelForge

# compute_specs -> the config whose plan fits into the smallest of its GPUs (4, 8, 16 GB)
COMPUTE_SPECS = {"low_end": "gpu_8gb.py", "mid_range": "gpu_12gb.py", "high_end": "gpu_24gb.py"}
SUPPLIED = (  # by that config: what depends on the memory; the schema has defaults for the rest
    "model.max_seq_length quantization.bits quantization.type quantization.double quantization.dequantize "
    "training.micro_batch_size training.gradient_accumulation_steps training.checkpointing evaluation.batch_size "
    "evaluation.prompt_batch_size"
)
TASKS = {"text-generation": {}, "summarization": "summarization", "extractive-question-answering": "extractive_qa"}
SFT = {"training.objective": "sft", "training.method": "lora"}
MODELFORGE_ONLY = {
    "task": Alias("data.format", TASKS),
    "provider": Alias(values={"huggingface": {}, "unsloth": Note("nanoft's own kernels are used instead")}),
    "strategy": Alias(
        "training.objective",
        {"sft": SFT, "qlora": SFT | {"quantization.bits": 4}, "dpo": "dpo", "rlhf": "rlhf"},
    ),
    "compute_specs": Alias(
        values={
            specs: Note(f"configs/{file} supplies what the file leaves out") for specs, file in COMPUTE_SPECS.items()
        }
    ),
}
MODELFORGE = Schema(
    "ModelForge",
    ALIASES
    | MODELFORGE_ONLY
    | {
        "model_name": Alias("model.name", filled),
        "dataset": Alias("data.train_file", filled),
        "use_4bit": Alias("quantization.bits", {True: 4, False: 16}),
        "lora_r": Alias("lora.rank", between(1, 256, "integer")),
        "num_train_epochs": Alias("training.num_epochs", between(1, float("inf"), "integer")),
        "learning_rate": Alias("training.learning_rate", between(0, 1, above=True)),
        "eval_split": Alias("data.validation_split", between(0, 1)),
        "max_seq_length": Alias("model.max_seq_length", {-1: {}}, open=True),
    },
    [*RULES, Rule("use_4bit", "use_8bit is true", lambda file: file.get("use_8bit") and not file["use_4bit"])],
    {
        "lora.dropout": 0.1,
        "data.validation_split": 0.2,
        "data.group_by_length": True,
        "training.num_epochs": 1,
        "training.max_grad_norm": 0.3,
        "training.weight_decay": 0.001,
    },
)

# --- MLX

MLX_SAME = set(  # names that mean the same here
    [
        "model.name",
        "model.max_seq_length",
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.target_modules",
        "lora.bias",
        "data.validation_size",
        "training.gradient_accumulation_steps",
        "training.num_epochs",
        "training.learning_rate",
        "training.weight_decay",
        "training.max_grad_norm",
        "training.warmup_steps",
        "training.min_lr_ratio",
        "training.eval_steps",
        "training.save_steps",
        "training.label_smoothing",
        "training.early_stopping_patience",
        "training.early_stopping_threshold",
        "system.seed",
        "system.device",
    ]
)


def plots(when: Any) -> Any:
    """Plots, if matplotlib is installed."""
    if when not in ("step", "epoch", "end"):
        raise ValueError("is none of step, epoch, end")
    return installed("matplotlib", {"logging.plots": when})


LAYOUT = noted("the run directory (output.dir) has its own layout: checkpoints/, adapter/, train.log, metrics.jsonl")
MLX_NAMES = {  # the others
    "model.cache_dir": Alias(values=noted("HF_HOME in the environment chooses the cache")),
    "model.dtype": Alias("model.dtype", DTYPES),
    "model.trust_remote_code": Alias(
        values={False: {}, True: Note("code that comes with a model is never run, and not needed")}
    ),
    "lora.task_type": ALIASES["task_type"],
    "data.dataset_path": Alias("data.train_file", filled),
    "data.train_split": Alias("data.validation_split", lambda share: round(1 - between(0, 1, above=True)(share), 12)),
    "data.shuffle": Alias(values={True: {}}, fix="remove it: every epoch has another order"),
    "data.seed": Alias(values=noted("system.seed also seeds the split and the order")),
    "data.max_examples": Alias("data.max_samples"),
    "training.batch_size": Alias("training.micro_batch_size"),
    "training.max_steps": Alias("training.max_steps", steps),
    "training.adam_beta1": Alias("training.beta1"),
    "training.adam_beta2": Alias("training.beta2"),
    "training.adam_epsilon": Alias("training.epsilon"),
    "training.lr_scheduler_type": Alias(
        "training.lr_scheduler", {name: name for name in ("cosine", "linear", "constant")}
    ),
    "training.warmup_ratio": Alias(
        values=lambda share: {"training.warmup_ratio": share, "training.warmup_steps": None}
    ),
    "training.logging_steps": Alias("training.log_steps"),
    "training.save_total_limit": Alias("training.keep_checkpoints"),
    "training.save_best_checkpoint": Alias(values={True: {}, False: Note("the best checkpoint is always kept")}),
    "training.load_best_at_end": Alias(values={True: {}}, fix="the result is always the best checkpoint"),
    "output.output_dir": Alias("output.dir"),
    "output.checkpoint_dir": Alias(values=LAYOUT),
    "output.final_model_dir": Alias(values=LAYOUT),
    "output.logs_dir": Alias(values=LAYOUT),
    "output.metrics_dir": Alias(values=LAYOUT),
    "output.overwrite_output_dir": ALIASES["overwrite_output_dir"],
    "logging.level": Alias(
        values={"INFO": {}} | dict.fromkeys(("DEBUG", "WARNING", "ERROR"), Note("train.log has one level of detail"))
    ),
    "logging.console": Alias(values={True: {}, False: {"logging.progress_bar": False, "logging.show_example": False}}),
    "logging.file": Alias(values={True: {}, False: Note("train.log is always written")}),
    "logging.log_file": Alias(values=LAYOUT),
    "logging.json_logs": Alias(values={True: {}, False: Note("metrics.jsonl is always written")}),
    "logging.tensorboard": Alias(
        values=lambda on: installed("tensorboard", {"logging.report_to": "tensorboard"}) if on else {}
    ),
    "logging.wandb": Alias(values=lambda on: installed("wandb", {"logging.report_to": "wandb"}) if on else {}),
    "system.num_workers": Alias(values=noted("batches are made by the process that trains", 0)),
    "system.mixed_precision": Alias(values={True: {}, False: {"model.dtype": "float32"}}),
    "monitoring.track_memory": Alias(values={True: {}, False: Note("memory is always watched")}),
    "monitoring.memory_log_steps": Alias(values=noted("every train line has the memory (training.log_steps)")),
    "monitoring.track_gradients": Alias(values={True: {}, False: {"logging.gradient_steps": 0}}),
    "monitoring.gradient_log_steps": Alias("logging.gradient_steps"),
    "monitoring.save_metrics_plot": Alias(values={True: {}, False: {"logging.plots": "none"}}),
    "monitoring.plot_frequency": Alias("logging.plots", plots),
    "evaluation.eval_on_start": Alias(
        values={False: {}, True: Note("the report compares with the base model at the end")}
    ),
    "evaluation.eval_accumulation_steps": Alias(values=noted("an evaluation keeps sums, and no outputs to move")),
    "evaluation.generate_samples": Alias(values={True: {}, False: {"evaluation.samples": 0}}),
    "evaluation.num_samples": Alias("evaluation.samples"),
    "evaluation.sample_max_length": Alias("evaluation.max_new_tokens"),
    "evaluation.sample_temperature": Alias("evaluation.temperature", between(0, 2, above=True)),
    "evaluation.sample_top_p": Alias("evaluation.top_p", between(0, 1, above=True)),
    "advanced.gradient_checkpointing": ALIASES["gradient_checkpointing"],
    "advanced.compile_model": Alias("training.compile"),
    "advanced.use_cache": Alias(values={True: {}, False: Note("answers are the same with the cache, and faster")}),
    "advanced.pad_to_multiple_of": Alias("data.pad_to_multiple_of"),
    "advanced.dataloader_pin_memory": Alias(values=noted("it changes no result here", False)),
    "advanced.debug_mode": Alias(values={True: {"system.debug": True}, False: {}}),
    "advanced.profile_training": Alias("system.profile"),
    "advanced.detect_anomaly": Alias(values={True: {"system.debug": True}, False: {}}),
}
SAMPLING = "evaluation.num_samples evaluation.sample_max_length evaluation.sample_temperature evaluation.sample_top_p"


def _mlx_warnings(config: Config) -> list[str]:
    """The warnings of the schema's `validate` that nanoft does not have for every config."""
    t, length, rank = config.training, config.model.max_seq_length, config.lora.rank
    found = {
        f"batch_size={t.micro_batch_size}: more than 4 may run out of memory on 24 GB": config.micro_batch_rows() > 4,
        f"max_seq_length={length}: more than 2048, Mistral's native context in this schema": length > 2048,
        f"lora.rank={rank}: quite large; 8 to 32 are typical": rank > 64,
        f"learning_rate={t.learning_rate}: more than 1e-4 without warm-up steps": t.learning_rate > 1e-4
        and t.warmup_steps == 0,
    }
    return [text for text, applies in found.items() if applies]


MLX = Schema(
    "MLX",
    {name: Alias(name) for name in FIELDS} | MLX_NAMES,
    [
        Rule("training.warmup_steps", "warmup_ratio is set", lambda file: file.get("training.warmup_ratio")),
        Rule("training.num_epochs", "max_steps is set", lambda file: file.get("training.max_steps")),
        Rule("data.train_split", "validation_size is set", lambda file: file.get("data.validation_size")),
        Rule(SAMPLING, "generate_samples is false", lambda file: file.get("evaluation.generate_samples") is False),
        Rule(
            "monitoring.gradient_log_steps",
            "track_gradients is false",
            lambda file: file.get("monitoring.track_gradients") is False,
        ),
        Rule(
            "monitoring.plot_frequency",
            "save_metrics_plot is false",
            lambda file: file.get("monitoring.save_metrics_plot") is False,
        ),
    ],
    {
        "model.dtype": "float16",
        "lora.dropout": 0.05,
        "lora.target_modules": ["q_proj", "v_proj"],
        "data.validation_split": 0.1,
        "training.micro_batch_size": 2,
        "training.weight_decay": 0.01,
        "training.warmup_steps": 100,
        "training.long_warmup": "warn",  # as its `validate` does
        "training.min_lr_ratio": 0.1,
        "training.eval_steps": 50,
        "training.save_steps": 100,
        "training.early_stopping_threshold": 1e-4,
        "training.checkpointing": "none",
        "logging.plots": "epoch" if importlib.util.find_spec("matplotlib") else "none",
        "logging.gradient_steps": 100,
        "system.seed": 42,
        "evaluation.samples": 5,
        "evaluation.max_new_tokens": 100,
        "evaluation.temperature": 0.7,
        "evaluation.top_p": 0.9,
    },
    {
        "BATCH_SIZE": "training.batch_size",
        "LEARNING_RATE": "training.learning_rate",
        "NUM_EPOCHS": "training.num_epochs",
        "LORA_RANK": "lora.rank",
        "DATASET_PATH": "data.dataset_path",
        "OUTPUT_DIR": "output.output_dir",
    },
    _mlx_warnings,
)
HUGGING_FACE = Schema("Hugging Face", ALIASES, RULES)


def is_flat(tree: Mapping[str, Any]) -> bool:
    """Whether a file has names at its top, and no sections."""
    has_settings = any(name in ALIASES or not isinstance(value, Mapping) for name, value in tree.items())
    return has_settings and not tree.keys() & (SECTION_TYPES.keys() | {"monitoring", "advanced"})


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"lora": {"rank": 8}} -> {"lora.rank": 8}."""
    for section, fields in tree.items():
        if not isinstance(fields, Mapping):
            known = "is not a mapping of fields" if section in SECTION_TYPES else "is no section"
            raise UserError(f"{section}: {fields!r:.100} {known}")
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}


def recognize(tree: Mapping[str, Any]) -> Schema | None:
    """The schema of a file, by its names; None: nanoft's own."""
    if is_flat(tree):
        return MODELFORGE if tree.keys() & MODELFORGE_ONLY.keys() else HUGGING_FACE
    names = {f"{section}.{name}" for section, fields in tree.items() if isinstance(fields, Mapping) for name in fields}
    theirs, ours = names & (MLX_NAMES.keys() - FIELDS.keys()), names & (FIELDS.keys() - MLX_NAMES.keys() - MLX_SAME)
    return MLX if len(theirs) > len(ours) else None


def check_modelforge(tree: Mapping[str, Any]) -> None:
    """What the schema demands of a file as a whole."""
    if tree.get("compute_specs") is None:
        raise UserError("compute_specs: missing: set low_end (4-6 GB), mid_range (8-12 GB) or high_end (16 GB or more)")
    if tree.get("provider") == "unsloth" and tree.get("max_seq_length", 1) in (None, -1):
        raise UserError("max_seq_length: unsloth needs a number: set it, for example to 2048")


def explain(schema: Schema, meanings: Sequence[Meaning]) -> list[str]:
    """A few lines for the terminal: how many names take effect, and the others with the reason."""
    notes: dict[str, list[str]] = {}
    for meaning in meanings:
        if meaning.note:
            notes.setdefault(meaning.note, []).append(meaning.name)
    effects = sum(bool(meaning.settings) for meaning in meanings)
    noted = sum(len(names) for names in notes.values())
    same = f"{len(meanings) - effects - noted} say what is the default here or are not set"
    head = f"{schema.name} schema: {effects} of {len(meanings)} names set fields ({FIELDS_FILE}), {same}"
    lines = [f"{m.name}={m.value} in the environment" for m in meanings if m.name in schema.environment]
    lines += [f"{', '.join(names)}: {why}" for why, names in notes.items()]
    return [wrap(f"config    {head}", 10), *(wrap(f"          {line}", 12) for line in lines)]
