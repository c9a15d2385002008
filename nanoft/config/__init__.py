"""Settings of a run: the typed tree (`settings`), reading it (`loading`), what may change on resume (`resume`)."""

from nanoft.config.settings import (
    Config,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    SystemConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OutputConfig",
    "QuantizationConfig",
    "SystemConfig",
    "TrainingConfig",
]
