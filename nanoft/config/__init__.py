"""Settings of a run: the dataclasses (`settings`), reading them (`loading`), what may change on resume (`resume`)."""

# isort: off
from nanoft.config.loading import load_config as load_config, load_file as load_file
from nanoft.config.settings import (
    Config as Config, DataConfig as DataConfig, EvaluationConfig as EvaluationConfig, GuardConfig as GuardConfig,
    LoggingConfig as LoggingConfig, LoRAConfig as LoRAConfig, ModelConfig as ModelConfig, OutputConfig as OutputConfig,
    QuantizationConfig as QuantizationConfig, SystemConfig as SystemConfig, TrainingConfig as TrainingConfig,
)  # fmt: skip
