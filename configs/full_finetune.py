"""A GPU with 80 GB: every parameter of Qwen2.5-3B-Instruct, with master weights and moments in float32.

For whoever teaches what no low-rank adapter can hold, with 10,000 samples or more: 16 bytes per parameter (weight,
gradient, two moments). Planned, not measured: 71.9 GB with as few blocks recomputed as needed, 60.3 GB with
checkpointing=full, 22.7 GFLOP per token. Change first: `data.train_file`; `training.optimizer=adamw_8bit` (10 bytes per
parameter); `training.learning_rate`, 5e-6 to 2e-5. A checkpoint takes 37 GB; the last and the best are kept.
"""

from nanoft.config import load_file

config = load_file("gpu_80gb.py", beside=__file__).override(
    model={"name": "Qwen/Qwen2.5-3B-Instruct", "max_seq_length": 2048},
    lora={"dropout": 0.0},
    training={
        "method": "full",
        "num_epochs": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "keep_checkpoints": 1,
    },
)
