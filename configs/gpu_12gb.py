"""A GPU with 12 to 16 GB (RTX 3060, 4070, 4080): Mistral-7B-Instruct-v0.3 with QLoRA, 2048 tokens.

For whoever wants to train a model of 7 billion parameters on a card for games. Planned, not measured: 10.7 GB, as many
blocks computed again as that takes, and 6.1 GB with all of them. Time: 33 GFLOP a token; tokens a second: not
measured. A card before Ampere (T4, RTX 20) computes in float32, at twice the memory: `auto` takes configs/gpu_8gb.py.
Change first: `data.train_file`; `model.max_seq_length=4096` fits, too; `lora.target_modules=attention` needs less.
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
        micro_batch_size=1,
        gradient_accumulation_steps=16,
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
    evaluation=EvaluationConfig(batch_size=4, prompt_batch_size=8),
    system=SystemConfig(device="cuda", memory_gb=12),
)
