"""A GPU with 80 GB: every parameter of Qwen2.5-3B-Instruct, with master weights and moments in float32.

For whoever teaches a model something that no adapter of small rank can hold, and has some ten thousand samples of it.
Sixteen bytes a parameter (weight, gradient, two moments) leave room for 3 billion. Planned, not measured: 71.5 GB, as
many blocks computed again as that takes, and 58.7 GB with all of them. Time: 22.7 GFLOP a token; tokens a second: not
measured. Change first: `data.train_file`; `training.optimizer=adamw_8bit`, which takes 10 bytes a parameter instead of
16; `training.learning_rate`, between 5e-6 and 2e-5. A checkpoint takes 37 GB on the disk, and the best is kept beside
the last.
"""

from nanoft.config import Config, DataConfig, EvaluationConfig, ModelConfig, SystemConfig, TrainingConfig

config = Config(
    model=ModelConfig(name="Qwen/Qwen2.5-3B-Instruct", dtype="bfloat16", max_seq_length=2048),
    data=DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=TrainingConfig(
        method="full",
        micro_batch_size=4,
        gradient_accumulation_steps=8,
        num_epochs=2,
        optimizer="adamw",
        learning_rate=1e-5,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.01,
        max_grad_norm=1.0,
        log_steps=10,
        eval_steps=100,
        save_steps=500,
        keep_checkpoints=1,
    ),
    evaluation=EvaluationConfig(prompt_batch_size=32),
    system=SystemConfig(device="cuda", memory_gb=80),
)
