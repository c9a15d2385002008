"""The config schemas of two other programs, whose files run unchanged; each is recognized by its names.

    {"task": "text-generation", "strategy": "qlora", "compute_specs": "low_end", ...}     ModelForge: flat
    training: {batch_size: 2, adam_beta1: 0.9, lr_scheduler_type: cosine}                 MLX: with sections

A schema is a table of names like that of `aliases.py`, its default values, and rules for names that have no effect
given others. The translation is summarized in a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoft import UserError
from nanoft.config.aliases import ALIASES, RULES, Alias, Note, Rule, Settings, noted, pairs
from nanoft.config.settings import FIELDS, SECTION_TYPES, Config
from nanoft.io.tables import wrap


@dataclass(frozen=True)
class Schema:
    """`defaults`: the schema's defaults that differ from nanoft's; `environment`: variable -> name."""

    name: str
    table: Mapping[str, Alias]
    rules: Sequence[Rule] = ()
    defaults: Settings = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    warn: Callable[[Config], list[str]] = lambda config: []


def up_to(high: float, *types: type) -> Callable[[Any], Any]:
    """A check that a number is in (0, high]."""

    def check(value: Any) -> Any:
        if type(value) not in (types or (int, float)) or not 0 < value <= high:
            raise ValueError(f"must be a {'whole ' * bool(types)}number > 0 and <= {high}")
        return value

    return check


# compute_specs -> the config whose plan fits the smallest of its GPUs (4, 8, 16 GB). It supplies the fields that depend
# on memory; the schema has defaults for the rest.
COMPUTE_SPECS = {"low_end": "gpu_8gb.py", "mid_range": "gpu_12gb.py", "high_end": "gpu_24gb.py"}
SUPPLIED = """
    model.max_seq_length quantization.bits quantization.type quantization.double quantization.dequantize
    training.micro_batch_size training.gradient_accumulation_steps training.checkpointing evaluation.batch_size
    evaluation.prompt_batch_size
"""
TASKS = {"text-generation": {}, "summarization": "summarization", "extractive-question-answering": "extractive_qa"}
SFT = {"training.objective": "sft", "training.method": "lora"}
STRATEGIES = {"sft": SFT, "qlora": SFT | {"quantization.bits": 4}, "dpo": "dpo", "rlhf": "grpo"}
MODELFORGE_ONLY = {
    "task": Alias("data.format", TASKS),
    "provider": Alias(values={"huggingface": {}, "unsloth": Note("nanoft's own kernels are used instead")}),
    "strategy": Alias("training.objective", STRATEGIES),
    "compute_specs": Alias(
        values={name: Note(f"configs/{file} supplies the missing settings") for name, file in COMPUTE_SPECS.items()}
    ),
}
MODELFORGE_NAMES = {
    **MODELFORGE_ONLY,
    "dataset": Alias("data.train_file"),
    "use_4bit": Alias("quantization.bits", {True: 4, False: 16}),
    "lora_r": Alias("lora.rank", up_to(256, int)),
    "num_train_epochs": Alias("training.num_epochs", up_to(10**6, int)),
    "eval_split": Alias("data.validation_split"),
    "max_seq_length": Alias("model.max_seq_length", {-1: {}}, open=True),
}
MODELFORGE_DEFAULTS = """
    lora.dropout=0.1 data.validation_split=0.2 data.group_by_length=true training.num_epochs=1
    training.max_grad_norm=0.3 training.weight_decay=0.001 training.eval_steps=100
"""
BITS_RULE = Rule("use_4bit", "use_8bit", lambda other, own: other is True and not own)
RLHF_RULE = Rule("gradient_accumulation_steps", "strategy", lambda other, own: other == "rlhf")  # rl.prompts counts
MODELFORGE_RULES = [*RULES, BITS_RULE, RLHF_RULE]
MODELFORGE = Schema("ModelForge", ALIASES | MODELFORGE_NAMES, MODELFORGE_RULES, pairs(MODELFORGE_DEFAULTS))

# The MLX schema: name=field, and names with other values
MLX_RENAMED = """
    data.dataset_path=data.train_file data.max_examples=data.max_samples training.batch_size=training.micro_batch_size
    data.shuffle=training.shuffle evaluation.eval_on_start=evaluation.on_start
    training.adam_beta1=training.beta1 training.adam_beta2=training.beta2 training.adam_epsilon=training.epsilon
    training.logging_steps=training.log_steps training.save_total_limit=training.keep_checkpoints
    output.output_dir=output.dir monitoring.gradient_log_steps=logging.gradient_steps
    evaluation.num_samples=evaluation.samples evaluation.sample_max_length=evaluation.max_new_tokens
    advanced.compile_model=training.compile advanced.pad_to_multiple_of=data.pad_to_multiple_of
    advanced.profile_training=system.profile evaluation.sample_top_p=evaluation.top_p
"""
LAYOUT = "the run directory (output.dir) has its own layout: checkpoints/, adapter/, train.log, metrics.jsonl"
MLX_TRANSLATED = {
    "model.dtype": ALIASES["dtype"],
    "model.trust_remote_code": noted("code that comes with a model is never run", False),
    "lora.task_type": ALIASES["task_type"],
    "data.train_split": Alias("data.validation_split", lambda share: round(1 - up_to(0.999)(share), 12)),
    "data.seed": noted("system.seed also seeds the split and the order"),
    "training.max_steps": ALIASES["max_steps"],
    "training.lr_scheduler_type": Alias("training.lr_scheduler", {n: n for n in ("cosine", "linear", "constant")}),
    "training.warmup_ratio": Alias(values=lambda n: {"training.warmup_ratio": n, "training.warmup_steps": None}),
    "training.save_best_checkpoint": noted("the best checkpoint is always kept", True),
    "training.load_best_at_end": ALIASES["load_best_model_at_end"],
    **dict.fromkeys(("output.checkpoint_dir", "output.final_model_dir", "output.logs_dir"), noted(LAYOUT)),
    **dict.fromkeys(("output.metrics_dir", "logging.log_file"), noted(LAYOUT)),
    "output.overwrite_output_dir": ALIASES["overwrite_output_dir"],
    "logging.level": ALIASES["log_level"],
    "logging.console": Alias(values={True: {}, False: {"logging.progress_bar": False, "logging.show_example": False}}),
    "logging.file": noted("train.log is always written", True),
    "logging.json_logs": noted("metrics.jsonl is always written", True),
    "logging.tensorboard": Alias("logging.report_to", {False: {}, True: "tensorboard"}),
    "logging.wandb": Alias("logging.report_to", {False: {}, True: "wandb"}),
    "system.num_workers": noted("batches are made by the process that trains", 0),
    "system.mixed_precision": Alias(values={True: {}, False: {"model.dtype": "float32"}}),
    "monitoring.track_memory": noted("memory is always watched", True),
    "monitoring.memory_log_steps": noted("every train line includes the memory (training.log_steps)"),
    "monitoring.track_gradients": Alias(values={True: {}, False: {"logging.gradient_steps": 0}}),
    "monitoring.save_metrics_plot": Alias(values={True: {}, False: {"logging.plots": "none"}}),
    "monitoring.plot_frequency": Alias("logging.plots"),
    "evaluation.eval_accumulation_steps": noted("an evaluation keeps sums, so no outputs have to be moved"),
    "evaluation.generate_samples": Alias(values={True: {}, False: {"evaluation.samples": 0}}),
    "evaluation.sample_temperature": Alias("evaluation.temperature", up_to(2)),
    "advanced.gradient_checkpointing": ALIASES["gradient_checkpointing"],
    "advanced.use_cache": noted("the cache is always used: the same answers, faster", True),
    "advanced.dataloader_pin_memory": noted("changes no result here", False),
    "advanced.debug_mode": Alias(values={True: {"system.debug": True}, False: {}}),
    "advanced.detect_anomaly": Alias(values={True: {"system.debug": True}, False: {}}),
}
MLX_NAMES = {name: Alias(path) for name, path in pairs(MLX_RENAMED).items()} | MLX_TRANSLATED
SAMPLING = "evaluation.num_samples evaluation.sample_max_length evaluation.sample_temperature evaluation.sample_top_p"
MLX_RULES = [
    Rule("training.warmup_steps", "training.warmup_ratio", lambda other, own: other),
    Rule("training.num_epochs", "training.max_steps", lambda other, own: other),
    Rule("training.min_lr_ratio", "training.lr_scheduler_type", lambda other, own: other == "constant"),
    Rule("training.early_stopping_threshold", "training.early_stopping_patience", lambda other, own: not other),
    Rule("data.train_split", "data.validation_size", lambda other, own: other),
    Rule(SAMPLING, "evaluation.generate_samples", lambda other, own: other is False),
    Rule("monitoring.gradient_log_steps", "monitoring.track_gradients", lambda other, own: other is False),
    Rule("monitoring.plot_frequency", "monitoring.save_metrics_plot", lambda other, own: other is False),
]
MLX_DEFAULTS = """
    model.dtype=float16 lora.dropout=0.05 lora.target_modules=q_proj,v_proj data.validation_split=0.1
    training.micro_batch_size=2 training.weight_decay=0.01 training.warmup_steps=100 training.long_warmup=warn
    training.min_lr_ratio=0.1 training.eval_steps=50 training.save_steps=100 training.early_stopping_threshold=1e-4
    training.checkpointing=none logging.gradient_steps=100 logging.plots=epoch system.seed=42
    evaluation.samples=5 evaluation.max_new_tokens=100 evaluation.temperature=0.7 evaluation.top_p=0.9
"""
MLX_ENVIRONMENT = """
    BATCH_SIZE=training.batch_size LEARNING_RATE=training.learning_rate NUM_EPOCHS=training.num_epochs
    LORA_RANK=lora.rank DATASET_PATH=data.dataset_path OUTPUT_DIR=output.output_dir
"""


def mlx_warnings(config: Config) -> list[str]:
    """The warnings of the schema's `validate` that nanoft does not give for every config."""
    t, length, rank = config.training, config.model.max_seq_length, config.lora.rank
    found = {
        f"batch_size={t.micro_batch_size}: more than 4 may run out of memory on 24 GB": config.micro_batch_rows() > 4,
        f"max_seq_length={length}: more than 2048, the longest context of this schema": length > 2048,
        f"lora.rank={rank}: quite large; 8 to 32 are typical": rank > 64,
        f"learning_rate={t.learning_rate}: above 1e-4 without warm-up": t.learning_rate > 1e-4 and t.warmup_steps == 0,
    }
    return [text for text, applies in found.items() if applies]


MLX = Schema(
    "MLX",
    {path: Alias(path) for path in FIELDS} | MLX_NAMES,  # nanoft's own names are accepted too
    MLX_RULES,
    pairs(MLX_DEFAULTS),
    pairs(MLX_ENVIRONMENT),
    mlx_warnings,
)
MLX_SECTIONS = ("monitoring", "advanced")  # sections that nanoft does not have
HUGGING_FACE = Schema("Hugging Face", ALIASES, RULES)


def is_flat(tree: Mapping[str, Any]) -> bool:
    """Whether a file has its names at the top level, without sections."""
    has_settings = any(name in ALIASES or not isinstance(value, Mapping) for name, value in tree.items())
    names = {name for name, value in tree.items() if name in ALIASES and not isinstance(value, Mapping)}  # `rl: dpo`
    return has_settings and not (tree.keys() - names) & {*SECTION_TYPES, *MLX_SECTIONS}


def recognize(tree: Mapping[str, Any]) -> Schema | None:
    """The schema of a file, by its names; None: nanoft's own."""
    if is_flat(tree):
        return MODELFORGE if tree.keys() & MODELFORGE_ONLY.keys() else HUGGING_FACE
    names = {f"{section}.{name}" for section, fields in tree.items() if isinstance(fields, Mapping) for name in fields}
    only_theirs = names & MLX_NAMES.keys() - FIELDS.keys()
    only_ours = names & {alias.field for alias in MLX_NAMES.values()} - MLX_NAMES.keys()  # MLX has other names for them
    return MLX if len(only_theirs) > len(only_ours) else None


def for_compute_specs(file: Mapping[str, Any], load: Callable[[str], Config]) -> Settings:
    """The fields that the config for compute_specs supplies to a ModelForge file; `load` reads that config."""
    if (given := file.get("compute_specs")) not in list(COMPUTE_SPECS):
        raise UserError(f"compute_specs: {given!r:.60}: set low_end (4-6 GB), mid_range (8-12 GB) or high_end (16 GB)")
    if file.get("provider") == "unsloth" and file.get("max_seq_length", 1) in (None, -1):
        raise UserError("max_seq_length: unsloth needs a number: set it, for example to 2048")
    config = load(COMPUTE_SPECS[given]).flat()
    idle = {"training.gradient_accumulation_steps"} if file.get("strategy") == "rlhf" else set()
    return {path: config[path] for path in SUPPLIED.split() if path not in idle}


def explain(schema: Schema, meanings: Mapping[str, Settings | Note], environment: Mapping[str, str]) -> list[str]:
    """A few lines for the terminal: how many names set fields, and why the others do not."""
    notes: dict[str, list[str]] = {}
    for name, meaning in meanings.items():
        if isinstance(meaning, Note):
            notes.setdefault(meaning, []).append(name)
    same = sum(meaning == {} for meaning in meanings.values())
    effects = len(meanings) - same - sum(map(len, notes.values()))
    counts = f"{effects} of {len(meanings)} names set fields, {same} left at the default"
    lines = [f"{name}={environment[name]} in the environment" for name in meanings if name in schema.environment]
    lines += [f"{', '.join(names)}: {why}" for why, names in notes.items()]
    return [wrap(f"config    {schema.name} schema: {counts}", 10), *(wrap(f"          {line}", 12) for line in lines)]
