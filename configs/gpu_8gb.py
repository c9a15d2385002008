"""A GPU with 8 GB (RTX 3060 Ti, 3070, 4060): Qwen2.5-3B-Instruct with QLoRA, 2048 tokens.

For whoever has a laptop or a small card, perhaps with a screen on it. Planned, not measured: 7.1 GB, as many blocks
computed again as that takes, and 3.2 GB with all of them. Time: 13.4 GFLOP a token; tokens a second: not measured.
Change first: `data.train_file`; `training.checkpointing=full` if other programs need the card, too; a model of 7
billion parameters (configs/gpu_12gb.py) fits as well, and leaves nothing for a screen.
"""

from nanoft.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoRAConfig,
    ModelConfig,
    QuantizationConfig,
    SystemConfig,
    TrainingConfig,
)

config = Config(
    model=ModelConfig(name="Qwen/Qwen2.5-3B-Instruct", max_seq_length=2048),
    lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=QuantizationConfig(bits=4, type="nf4", double=True, dequantize="per_use"),
    data=DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=TrainingConfig(
        micro_batch_size=1,
        gradient_accumulation_steps=16,
        num_epochs=3,
        optimizer="adamw_8bit_paged",
        learning_rate=2e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.01,
        max_grad_norm=0.3,
        log_steps=10,
        eval_steps=100,
        save_steps=500,
        keep_checkpoints=3,
    ),
    evaluation=EvaluationConfig(batch_size=4, prompt_batch_size=8),
    system=SystemConfig(device="cuda", memory_gb=8),
)
