"""A GPU with 24 GB (RTX 3090, 4090, A10, L4): Qwen2.5-7B-Instruct with QLoRA, 4096 tokens.

For whoever has one good consumer card. Planned, not measured: 20.8 GB with as few blocks recomputed as needed,
11.0 GB with checkpointing=full, 37.7 GFLOP per token. Change first: `data.train_file`; `data.packing=true` or
`model.max_seq_length=2048` for short samples.
"""

from nanoft.config import load_file

config = load_file("h100.py", beside=__file__).override(
    model={"name": "Qwen/Qwen2.5-7B-Instruct"},
    quantization={"dequantize": "per_use"},
    training={"micro_batch_size": 2, "gradient_accumulation_steps": 8},
    evaluation={"batch_size": 8, "prompt_batch_size": 16},
    system={"memory_gb": 24},
)
