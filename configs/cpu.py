"""A machine without a GPU: Qwen2.5-0.5B-Instruct with LoRA in float32, 1024 tokens.

For whoever has a laptop and patience, and data for one narrow task. Planned, not measured: 5.7 GB beside what Python
and PyTorch take, and 3.3 GB with every block computed again. Time: 1.91 GFLOP a token, at about half of the speed of
bare matrix products: `--plan` measures these and says what a step will take. Change first: `data.train_file`;
`model.max_seq_length=512`; `training.max_steps`; on a CPU with other work to do, `system.threads=1`.
"""

from nanoft.config import Config, DataConfig, EvaluationConfig, LoRAConfig, ModelConfig, SystemConfig, TrainingConfig

config = Config(
    model=ModelConfig(name="Qwen/Qwen2.5-0.5B-Instruct", dtype="float32", max_seq_length=1024),
    lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
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
    evaluation=EvaluationConfig(batch_size=4, prompts=20, prompt_batch_size=4),
    system=SystemConfig(device="cpu"),
)
