"""A machine without a GPU: Qwen2.5-0.5B-Instruct with LoRA in float32, 1024 tokens.

For whoever has a laptop, patience, and data for one narrow task. Planned, not measured: 5.3 GB beyond Python and
PyTorch, 2.9 GB with checkpointing=full, 1.91 GFLOP per token; `--plan` measures the speed here. Change first:
`data.train_file`; `model.max_seq_length=512`; `training.max_steps`.
"""

from nanoft.config import load_file

config = load_file("gpu_80gb.py", beside=__file__).override(
    model={"name": "Qwen/Qwen2.5-0.5B-Instruct", "dtype": "float32", "max_seq_length": 1024},
    training={"micro_batch_size": 2, "gradient_accumulation_steps": 8},
    evaluation={"batch_size": 4, "prompts": 20, "prompt_batch_size": 4},
    system={"device": "cpu", "memory_gb": None},
)
