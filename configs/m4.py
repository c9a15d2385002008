"""A Mac with an M-series chip and 32 GB: Mistral-7B-Instruct-v0.3 with QLoRA on Metal, 2048 tokens.

For whoever trains where they work. macOS lets the GPU have about 22.9 of the 32 GB. Planned, not measured: 18.5 GB,
and 7.5 GB with every block computed again. Time: 30.3 GFLOP a token; tokens a second: not measured. Change first:
`data.train_file`; with 16 GB of memory, `model.name=Qwen/Qwen2.5-3B-Instruct`; with 32 and no other program open,
`quantization.bits=16`, which spares unpacking the weights at every use. docs/metal.md: what to try first.
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
    model=ModelConfig(name="mistralai/Mistral-7B-Instruct-v0.3", max_seq_length=2048),
    lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=QuantizationConfig(bits=4, type="nf4", double=True, dequantize="per_use"),
    data=DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=TrainingConfig(
        micro_batch_size=2,
        gradient_accumulation_steps=8,
        num_epochs=3,
        optimizer="adamw",
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
    system=SystemConfig(device="mps", memory_gb=22.9),
)
