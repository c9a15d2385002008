"""A GPU with 24 GB (RTX 3090, 4090, A10, L4): Qwen2.5-7B-Instruct with QLoRA, 4096 tokens.

For whoever has one good consumer card. Planned, not measured: 20.9 GB, as many blocks computed again as that takes,
and 11.1 GB with all of them. Time: 38.2 GFLOP a token; tokens a second: not measured. Change first: `data.train_file`;
`model.max_seq_length=2048` if your samples are short, which needs less and computes less again; `data.packing=true`.
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
    model=ModelConfig(name="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", max_seq_length=4096),
    lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=QuantizationConfig(bits=4, type="nf4", double=True, dequantize="per_use"),
    data=DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=TrainingConfig(
        micro_batch_size=2,
        gradient_accumulation_steps=8,
        num_epochs=3,
        optimizer="adamw_paged",
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
    evaluation=EvaluationConfig(batch_size=8, prompt_batch_size=16),
    system=SystemConfig(device="cuda", memory_gb=24),
)
