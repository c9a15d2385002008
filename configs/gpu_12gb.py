"""A GPU with 12 to 16 GB (RTX 3060, 4070, 4080): Mistral-7B-Instruct-v0.3 with QLoRA, 2048 tokens.

For whoever trains 7 billion parameters on a consumer card. Planned, not measured: 10.7 GB with as few blocks
recomputed as needed, 6.1 GB with checkpointing=full, 32.6 GFLOP per token. A card before Ampere computes in float16;
for those with 16 GB (T4) there is configs/gpu_16gb_fp16.py. Change first: `data.train_file`;
`model.max_seq_length=4096` fits too; `lora.target_modules=attention` needs less.
"""

from nanoft.config import load_file

config = load_file("h100.py", beside=__file__).override(
    model={"dtype": "auto", "max_seq_length": 2048},
    quantization={"dequantize": "per_use"},
    training={"micro_batch_size": 1, "gradient_accumulation_steps": 16},
    evaluation={"batch_size": 4, "prompt_batch_size": 8},
    system={"memory_gb": 12},
)
