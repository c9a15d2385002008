"""A GPU with 16 GB without bfloat16 (T4, V100, Quadro RTX 5000): Mistral-7B-Instruct-v0.3 with QLoRA in float16, 2048 tokens.

For whoever has a free notebook or an older server. Planned, not measured: X GB, Y GB with every block recomputed,
Z GFLOP per token. The loss is scaled for backward, and a step whose gradient overflows is skipped and counted
(`overflow_steps`). Change first: `data.train_file`; `model.max_seq_length=1024` if a screen uses the card.
"""

from nanoft.config import load_file

config = load_file("gpu_12gb.py", beside=__file__).override(model={"dtype": "float16"}, system={"memory_gb": 15})
